"""Dense models and DeepSeek-V3 without a query LoRA equal transformers under every cut.

One launch per layout builds all models, one after the other, in the same processes.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import tiny
from tests.distributed.launch import run_ranks

BATCHES = [tiny.random_batch(seed=seed) for seed in (3, 4)]
# Entries whose gradient is rounding noise must not move by a whole lr in either direction.
SETTINGS = replace(tiny.SETTINGS, adam_eps=1e-3)
DENSE = ["llama", "qwen2", "qwen2 tied"]
MOE = ["deepseek_v3 without query lora"]
LAYOUTS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "single": (DENSE + MOE, {"world": 1}),
    "tp2": (DENSE, {"world": 2, "tp": 2}),
    "pp2": (DENSE + MOE, {"world": 2, "pp": 2}),
    "tp2 pp2": (DENSE, {"world": 4, "tp": 2, "pp": 2}),
    "tp2 pp2 ep2": (MOE, {"world": 4, "tp": 2, "pp": 2, "ep": 2}),
    "more ranks than key-value heads": (["llama"], {"world": 4, "tp": 4}),
}
CASES = [(layout, name) for layout, (names, _) in LAYOUTS.items() for name in names]


def facts(inits: dict[str, str], **axes: Any) -> dict[str, dict[str, Any]]:
    """Runs on every rank: of every model log-probs, gradients, and the weights of two updates."""
    from r1mega.algorithms.losses import next_token_loss

    groups = None
    found = {}
    for name, init in inits.items():
        model = replace(tiny.MODELS[name], init=init)
        learner = tiny.tiny_learner(model=model, settings=SETTINGS, groups=groups, **axes)
        groups = learner.groups
        found[name] = {
            "logprobs": learner.logprobs(tiny.random_batch()),
            "gradients": tiny.gradients(learner),
            "metrics": [learner.update(batch, next_token_loss, lr=1e-3) for batch in BATCHES],
            "updated": tiny.weights(learner),
            "embedding": {
                piece.megatron_name: learner.weights.region(piece).tolist()
                for piece in learner.weights.slices
                if piece.hf_name == "model.embed_tokens.weight"
            },
        }
    return found


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Of every model transformers' network and the folder it was saved to."""
    made = {}
    for name in DENSE + MOE:
        folder = tmp_path_factory.mktemp("hf")
        made[name] = (folder, tiny.transformers_model(tiny.MODELS[name], folder))
    return made


@pytest.fixture(scope="module")
def ranks(networks: dict[str, tuple[Path, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Of every layout what its ranks found."""
    return {
        layout: run_ranks(
            __name__, "facts", inits={name: str(networks[name][0]) for name in names}, **axes
        )
        for layout, (names, axes) in LAYOUTS.items()
    }


@pytest.fixture(scope="module")
def found(ranks: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Of every layout what its first rank found: it has the whole tensors."""
    return {layout: facts[0] for layout, facts in ranks.items()}


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_logprobs_equal_transformers(layout: str, name: str, found: Any, networks: Any) -> None:
    batch = tiny.random_batch()
    expected = tiny.transformers_logprobs(networks[name][1], batch)
    for mine, theirs in zip(found[layout][name]["logprobs"], expected, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_gradients_equal_transformers(layout: str, name: str, found: Any, networks: Any) -> None:
    """Every parameter's gradient, relative to the largest entry of its tensor."""
    theirs = tiny.transformers_gradients(networks[name][1], tiny.random_batch())
    tiny.assert_close(found[layout][name]["gradients"], theirs)


@pytest.mark.parametrize(("layout", "name"), [case for case in CASES if case[0] != "single"])
def test_updates_equal_a_single_process(layout: str, name: str, found: Any) -> None:
    mine, single = found[layout][name], found["single"][name]
    for key in ("loss", "learner/grad_norm"):
        expected = [step[key] for step in single["metrics"]]
        assert [step[key] for step in mine["metrics"]] == pytest.approx(expected, rel=1e-5), key
    tiny.assert_close(mine["updated"], single["updated"])


@pytest.mark.parametrize("layout", ["pp2", "tp2 pp2"])
def test_both_copies_of_a_tied_embedding_stay_equal(layout: str, ranks: Any) -> None:
    held = [facts["qwen2 tied"]["embedding"] for facts in ranks[layout]]
    half = len(held) // 2
    for first, last in zip(held[:half], held[half:], strict=True):
        assert list(first) == ["embedding.word_embeddings.weight"]
        assert list(last) == ["output_layer.weight"]
        assert [*first.values()] == [*last.values()]
