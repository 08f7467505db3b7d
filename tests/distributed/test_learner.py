"""The learner equals transformers; layouts are compared with each other in test_layouts."""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import tiny
from tests.distributed.launch import run_ranks

LAYOUTS: dict[str, dict[str, Any]] = {
    "single": {"world": 1},
    "tp2 pp2 ep2": {"world": 4, "tp": 2, "pp": 2, "ep": 2},
}


def learner_facts(init: str, **axes: Any) -> dict[str, Any]:
    """Runs on every rank: log-probs, and the gradient of a next-token loss under HF names."""
    learner = tiny.tiny_learner(model=tiny.with_init(Path(init)), **axes)
    logprobs = learner.logprobs(tiny.random_batch())
    return {"logprobs": logprobs, "gradients": tiny.gradients(learner)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("hf")
    return folder, tiny.transformers_model(tiny.MODEL, folder)


@pytest.mark.parametrize("name", LAYOUTS)
def test_learner_equals_transformers(name: str, checkpoint: Any) -> None:
    """Log-probs, and every parameter's gradient relative to the largest entry of its tensor."""
    folder, network = checkpoint
    facts = run_ranks(__name__, "learner_facts", init=str(folder), **LAYOUTS[name])[0]
    expected = tiny.transformers_logprobs(network, tiny.random_batch())
    for mine, theirs in zip(facts["logprobs"], expected, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    theirs = tiny.transformers_gradients(network, tiny.random_batch())
    tiny.assert_close(facts["gradients"], theirs)


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
