"""Routing replay through the command line: a bf16 learner (tp2 pp2 ep2) and two fp32 engines."""

import os
import shutil
import signal
from pathlib import Path
from statistics import fmean

import pytest

from tests.distributed.test_failures import Run, outcome, rows

JOB = [
    "configs/smoke/r1_zero.yaml",
    "name=run",
    "stage.steps=12",
    "stage.eval_every=0",
    "stage.save_every=3",
    "stage.keep_rollouts=true",
    "data.size=64",
    "data.held_out=4",
    "algorithm.prompts_per_step=8",
    "algorithm.group_size=4",
    "rollout.max_response_tokens=24",
    "learner.precision=bf16",
    "algorithm.replay_routing=true",
]
ALONE = [f"parallel.{axis}=1" for axis in ("tp", "pp", "ep")]
ALONE.append("cluster.learner_processes_per_node=1")


@pytest.fixture(scope="module")
def job(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps of a bf16 learner (tp2 pp2 ep2) with two fp32 engines, by the command line."""
    run = Run(tmp_path_factory.mktemp("job"), *JOB, base)
    assert run.end() == 0, run.said()
    return run.folder


def test_a_job_replays_what_its_engines_chose(job: Path) -> None:
    steps = rows(job)
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert 0 < fmean(row["mismatch/routing"] for row in steps) < 0.1
    assert all(row["mismatch/outside_band"] == 0 for row in steps)
    assert max(row["learner/grad_norm"] for row in steps) > 1e-3
    assert "routed_experts" not in (job / "samples.jsonl").read_text()


def test_replay_closes_the_gap_between_bf16_learner_and_fp32_engines(
    tmp_path: Path, runs: list[Run]
) -> None:
    """One rollout of a random network: trained as drawn, and kept and trained with and without."""
    fresh = [*JOB, *ALONE, "stage.steps=1", "model.init=random", "rollout.max_response_tokens=64"]
    kept = ["stage.only=train", f"rollout.replay={tmp_path / 'drawn/run/rollouts'}"]
    ways = {"drawn": [], "with": kept, "without": [*kept, "algorithm.replay_routing=false"]}
    found = {}
    for way, layers in ways.items():
        (tmp_path / way).mkdir()
        runs.append(run := Run(tmp_path / way, *fresh, *layers))
        assert run.end() == 0, run.said()
        (found[way],) = rows(run.folder)
    for key in ("mismatch/kl", "mismatch/max", "mismatch/routing", "mismatch/outside_band"):
        assert found["with"][key] == found["drawn"][key], key
    assert found["with"]["mismatch/routing"] > 0
    assert found["with"]["mismatch/kl"] < found["without"]["mismatch/kl"] / 5
    assert found["with"]["mismatch/max"] < found["without"]["mismatch/max"] / 4


def test_a_resumed_job_that_loses_an_engine_ends_in_the_same_bits(
    job: Path, base: str, tmp_path: Path, runs: list[Run]
) -> None:
    """The engine that takes over chooses the same tokens, and the same experts."""
    shutil.copytree(job, tmp_path / "run")
    for step in (6, 9, 12):
        shutil.rmtree(tmp_path / f"run/checkpoints/step_{step:06d}")
    runs.append(run := Run(tmp_path, *JOB, base))
    run.until(lambda: 3 < len(rows(run.folder)) < 12)
    os.kill(run.fleet_pid("engine-0"), signal.SIGKILL)
    assert run.end() == 0, run.said()
    assert "engine-0 was ended by SIGKILL" in run.said()
    assert outcome(run.folder) == outcome(job)
