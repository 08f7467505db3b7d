"""The learner equals transformers, and itself under every layout."""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import tiny
from tests.distributed.launch import run_ranks

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {"world": 2},
    "tp2 with whole experts": {"world": 2, "tp": 2},
    "tp2 pp2 ep2": {"world": 4, "tp": 2, "pp": 2, "ep": 2},
    "pp2 vpp2": {"world": 2, "pp": 2, "vpp": 2},
    "tp2 ep2 etp2": {"world": 4, "tp": 2, "ep": 2, "etp": 2},
}


def learner_facts(init: str, **axes: Any) -> dict[str, Any]:
    """Runs on every rank: log-probs, the GRPO step and the weights' norms after it."""
    from r1mega.algorithms.losses import ClippedSurrogate

    learner = tiny.tiny_learner(model=tiny.with_init(Path(init)), **axes)
    batch = tiny.random_batch()
    logprobs = learner.logprobs(batch)
    loss = ClippedSurrogate(clip_low=0.2, clip_high=0.2, kl_coef=0.1, importance_cap=2.0)
    metrics = learner.update(batch, loss, lr=1e-3)
    return {
        "logprobs": logprobs,
        "metrics": metrics,
        "norms": {
            name: tensor.double().norm().item()
            for name, tensor in learner.hf_tensors()
            if tensor is not None
        },
        "second": learner.update(batch, loss, lr=1e-3),
    }


def gradient_facts(init: str, **axes: Any) -> dict[str, Any]:
    """Runs on every rank: the gradient of a next-token loss, under Hugging Face names."""
    return tiny.gradients(tiny.tiny_learner(model=tiny.with_init(Path(init)), **axes))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("hf")
    return folder, tiny.transformers_model(tiny.MODEL, folder)


@pytest.fixture(scope="module")
def single(checkpoint: tuple[Path, Any]) -> dict[str, Any]:
    return run("single", checkpoint[0])[0]


def run(name: str, folder: Path) -> list[dict[str, Any]]:
    axes = LAYOUTS.get(name, {"world": 1})
    return run_ranks(__name__, "learner_facts", init=str(folder), **axes)


def test_single_process_equals_transformers(checkpoint: Any, single: dict[str, Any]) -> None:
    expected = tiny.transformers_logprobs(checkpoint[1], tiny.random_batch())
    for mine, theirs in zip(single["logprobs"], expected, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_single_process(name: str, checkpoint: Any, single: dict[str, Any]) -> None:
    ranks = run(name, checkpoint[0])
    for facts in ranks:
        for mine, reference in zip(facts["logprobs"], single["logprobs"], strict=True):
            assert mine == pytest.approx(reference, abs=1e-5)
        for key in ("loss", "learner/grad_norm", "policy/kl", "policy/entropy", "mismatch/kl"):
            assert facts["metrics"][key] == pytest.approx(single["metrics"][key], rel=1e-5), key
            assert facts["second"][key] == pytest.approx(single["second"][key], rel=1e-5), key
    assert ranks[0]["norms"] == pytest.approx(single["norms"], rel=1e-5)


@pytest.mark.parametrize("name", ["single", "tp2 pp2 ep2"])
def test_gradients_equal_transformers(name: str, checkpoint: Any) -> None:
    """Every parameter's gradient, relative to the largest entry of its tensor."""
    folder, network = checkpoint
    theirs = tiny.transformers_gradients(network, tiny.random_batch())
    axes = LAYOUTS.get(name, {"world": 1})
    tiny.assert_close(run_ranks(__name__, "gradient_facts", init=str(folder), **axes)[0], theirs)


def bias_facts(init: str, **axes: Any) -> list[list[float]]:
    """Runs on every rank: the expert bias of every layer after two updates that move it."""
    from dataclasses import replace

    from r1mega.algorithms.losses import next_token_loss

    settings = replace(tiny.SETTINGS, expert_bias_update_rate=1e-2, lr=0.0)
    learner = tiny.tiny_learner(model=tiny.with_init(Path(init)), settings=settings, **axes)
    for seed in (3, 4):
        learner.update(tiny.random_batch(seed=seed), next_token_loss, lr=0.0)
    return [
        tensor.tolist()
        for name, tensor in learner.hf_tensors()
        if tensor is not None and name.endswith("e_score_correction_bias")
    ]


def test_padding_does_not_move_the_expert_bias(checkpoint: Any) -> None:
    """tp=4 pads every microbatch to a multiple of 4; the bias moves as without padding."""
    init = str(checkpoint[0])
    (alone,) = run_ranks(__name__, "bias_facts", init=init, world=1)
    sharded = run_ranks(__name__, "bias_facts", init=init, world=4, tp=4, ep=2)[0]
    assert len(alone) == 3
    assert sharded == alone


def broken_facts(init: str, **axes: Any) -> str:
    """Runs on every rank: what an update says whose weights are not numbers."""
    from r1mega.algorithms.losses import next_token_loss

    learner = tiny.tiny_learner(model=tiny.with_init(Path(init)), **axes)
    learner.weights.region(learner.weights.slices[-1]).fill_(float("nan"))
    with pytest.raises(RuntimeError) as caught:
        learner.update(tiny.random_batch(), next_token_loss, lr=1e-3)
    return str(caught.value)


def test_a_loss_that_is_not_a_number_ends_every_rank(checkpoint: Any) -> None:
    said = run_ranks(__name__, "broken_facts", init=str(checkpoint[0]), world=2, pp=2)
    assert len(said) == 2
    assert all(text.startswith("the loss is nan: the weights") for text in said)


def repeated_facts(init: str, repeats: int, **axes: Any) -> list[tuple[float, float]]:
    """Runs on every rank: loss and gradient norm of one and the same update, many times."""
    from r1mega.algorithms.losses import next_token_loss

    learner = tiny.tiny_learner(model=tiny.with_init(Path(init)), **axes)
    batch = tiny.random_batch(num_sequences=24)
    steps = [learner.update(batch, next_token_loss, lr=0.0) for _ in range(repeats)]
    return [(step["loss"], step["learner/grad_norm"]) for step in steps]


@pytest.mark.parametrize("vpp", [None, 2])
def test_a_pipeline_repeats_itself_bit_for_bit(vpp: int | None, checkpoint: Any) -> None:
    """A send that outlives its buffer shows here: one wrong step in ten, and no error."""
    init = str(checkpoint[0])
    facts = run_ranks(__name__, "repeated_facts", init=init, repeats=50, world=2, pp=2, vpp=vpp)[0]
    assert len({tuple(step) for step in facts}) == 1
