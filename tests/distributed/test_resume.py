"""A run that continues under another layout is the run that was not interrupted.

Two proofs. Trained under one layout after the other, it takes the steps of a single process that
trains through, within what layouts differ by. And a checkpoint that is loaded and saved again under
other layouts comes back bit for bit when the first layout is reached again.
"""

import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.distributed import tiny
from tests.distributed.draws import draw, relaid
from tests.distributed.launch import run_ranks
from tests.distributed.layouts import RELATIVE, VOLATILE
from tests.distributed.resumes import Hop, Run, run_all
from tests.distributed.test_layouts import ALLGATHER, GATHER, OVERLAP, case

__all__ = ["run_all"]
pytestmark = pytest.mark.timeout(900)
MTP = {"num_nextn_predict_layers": 1}
BF16 = {"precision": "bf16"}


def hop(axes: str = "", world: int = 1, *, steps: int = 1, **learner: Any) -> Hop:
    """``hop("tp2 first1", 4, overlap_grad_reduce=True)``"""
    return Hop(world=world, axes=case(axes, world).axes, learner=learner, steps=steps)


def again(hops: list[Hop]) -> list[Hop]:
    """One update, then through all layouts back to the first."""
    still = [Hop(world=h.world, axes=h.axes, learner=h.learner, steps=0) for h in hops]
    return [hops[0], *still[1:], still[0]]


TRAINED = {
    "experts_mtp_bias": Run(
        model=MTP,
        mtp=True,
        hops=[
            hop("tp2 pp2 ep2", 4),
            hop(),
            hop("pp3 first1 last1", 3),
            hop("ep4", 4, **GATHER),
            hop("tp2 ep2 etp2", 4, **OVERLAP),
            hop("pp2 vpp2", 2, **ALLGATHER),
        ],
    ),
    "tied_few_heads": Run(
        network="qwen2 tied",
        hops=[hop(), hop("tp4", 4), hop("pp2", 4), hop("tp2 cp2", 4, **GATHER), hop("pp2 vpp2", 2)],
    ),
}
KEPT = {
    "bf16": Run(
        hops=again(
            [hop("tp2 pp2 ep2", 4, **BF16), hop("ep2 cp2", 4, **BF16, **GATHER), hop(**BF16)]
        )
    ),
    "precision": Run(hops=again([hop("tp2", 2), hop("ep2", 2, **BF16), hop()])),
    "mtp": Run(
        model=MTP, mtp=True, hops=again([hop("pp2 vpp2", 2), hop("tp4 etp2", 4), hop(world=3)])
    ),
    "llama": Run(network="llama", hops=again([hop("tp4", 4), hop("pp2 first1", 2), hop("tp2", 4)])),
}


def drawn(seed: int) -> Run:
    """A random network through four of its layouts."""
    worlds, rng = (1, 2, 3, 4), random.Random(seed)
    first = draw(seed, worlds)
    cases = [first, *(relaid(first, rng, worlds) for _ in range(3))]
    learner = {"precision": rng.choice(["bf16", "fp32"])}
    return Run(
        network=first.network,
        model=first.model,
        hops=again([Hop(world=c.world, axes=c.axes, learner=learner) for c in cases]),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs, in one launch."""
    root = tmp_path_factory.mktemp("resumes")
    straight = {
        f"straight_{name}": Run(
            network=run.network,
            model=run.model,
            mtp=run.mtp,
            hops=[hop(steps=len(run.hops))],
        )
        for name, run in TRAINED.items()
    }
    start(TRAINED | KEPT | straight, root)
    return root


def start(runs: dict[str, Run], root: Path) -> None:
    values = {name: asdict(run) for name, run in runs.items()}
    run_ranks(
        "tests.distributed.resumes",
        "run_all",
        world=4,
        timeout_s=800,
        runs=values,
        folder=str(root),
    )


@pytest.mark.parametrize("name", TRAINED)
def test_resumed_under_other_layouts_equals_uninterrupted(name: str, folder: Path) -> None:
    mine, reference = (folder / name, folder / f"straight_{name}")
    steps, expected = (json.loads((f / "metrics.json").read_text()) for f in (mine, reference))
    assert len(steps) == len(expected) == len(TRAINED[name].hops)
    for step, other in zip(steps, expected, strict=True):
        for key in step.keys() - VOLATILE:
            assert abs(step[key] - other[key]) <= RELATIVE * max(abs(other[key]), 0.1), key
    weights, others = (load_file(f / "weights.safetensors") for f in (mine, reference))
    assert weights.keys() == others.keys()
    for key, tensor in weights.items():
        scale = max(others[key].abs().max().item(), tiny.MODEL.initializer_range)
        assert (tensor - others[key]).abs().max().item() <= RELATIVE * scale, key


@pytest.mark.parametrize("name", KEPT)
def test_a_checkpoint_comes_back_bit_for_bit(name: str, folder: Path) -> None:
    assert_came_back(folder / name, len(KEPT[name].hops))


def assert_came_back(folder: Path, hops: int) -> None:
    first, last = (digests(folder / f"checkpoints/step_{step:06d}") for step in (1, hops))
    assert first == last
    assert any(name.startswith("optimizer") for name in first)


def digests(folder: Path) -> dict[str, str]:
    """Of weights and optimizer: generators are seeded anew."""
    files = json.loads((folder / "manifest.json").read_text())["files"]
    return {n: e["xxh3_128"] for n, e in files.items() if n.startswith(("weights", "optimizer"))}


@pytest.mark.soak
def test_checkpoints_of_random_layouts_come_back(tmp_path: Path) -> None:
    runs = {f"draw_{seed}": drawn(seed) for seed in range(40)}
    start(runs, tmp_path)
    for name, run in runs.items():
        assert_came_back(tmp_path / name, len(run.hops))
