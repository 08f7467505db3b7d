"""selftest passes a sound layout, and names the tensor of one rank that is not."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from r1mega.config import Config, load
from r1mega.config.load import dump
from r1mega.config.scaled import scale_down
from tests.distributed.launch import ROOT, run_ranks

LAYERS = ["parallel.tp=2", "parallel.ep=2", "cluster.learner_processes_per_node=2"]
DAMAGED = "model.layers.1.self_attn.o_proj.weight"


def comparisons(path: str) -> list[list[list[Any]]]:
    """Runs on every rank: a sound learner, one with a wrong weight, one with a wrong gradient."""
    from r1mega.parallel.backend import open_backend

    config = load([path])
    backend = open_backend("cpu")
    from r1mega.stages import selftest
    from r1mega.stages.worker import open_policy, open_worker

    expected = selftest.train_alone(config, backend) if os.environ["RANK"] == "0" else {}
    worker = open_worker(config, backend)
    found = []
    for damage in (None, _scale_weight, _scale_gradient):
        learner = open_policy(config, worker.groups, backend)
        if damage is not None and worker.groups.rank == 1:
            damage(learner)
        compared = selftest.compare_training(
            expected, selftest.train(learner, config), selftest.ALLOWED["fp32"]
        )
        found.append([[c.what, c.first] for c in compared])
    return found


def _scale_weight(learner: Any) -> None:
    piece = next(s for s in learner.weights.slices if s.hf_name == DAMAGED)
    learner.weights.region(piece).mul_(1.01)


def _scale_gradient(learner: Any) -> None:
    piece = next(s for s in learner.weights.slices if s.hf_name == DAMAGED)
    parameter = learner.weights.tensors[piece.chunk][piece.megatron_name]
    parameter.register_hook(lambda gradient: gradient * 1.01)


def small(config: Config, root: Path) -> Config:
    scaled = scale_down(config, processes=2, cuda=False, root=str(root))
    # Clipping would spread one wrong gradient over all.
    return dataclasses.replace(scaled, learner=dataclasses.replace(scaled.learner, clip_grad=1e6))


def test_a_rank_that_computes_something_else_is_caught(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    dump(small(load(LAYERS), tmp_path), path)
    sound, weight, gradient = run_ranks(__name__, "comparisons", world=2, path=str(path))[0]
    assert [first for _, first in sound] == [None] * len(sound)
    assert dict(weight)["initial weights"] == DAMAGED
    assert all(first is not None for _, first in weight)
    assert dict(gradient)["initial weights"] is dict(gradient)["log-probs"] is None
    assert dict(gradient)["loss"] == "loss and gradient norm"
    assert dict(gradient)["gradients"] == DAMAGED
    assert dict(gradient)["updated weights"] == DAMAGED


def selftest(tmp_path: Path, *layers: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "r1mega", "selftest", *layers],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def test_the_command_compares_layout_and_engine(tmp_path: Path) -> None:
    done = selftest(tmp_path, *LAYERS)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = done.stdout.splitlines()
    assert "one process against tp2 ep2:" in lines
    assert len([line for line in lines if line.endswith(": ok")]) == 6
    assert lines[-1] == "selftest passed"
    assert list(tmp_path.glob("r1mega-*")) == []  # nothing stays


def test_a_learner_that_is_not_the_engines_network_is_caught(tmp_path: Path) -> None:
    done = selftest(tmp_path, "learner.megatron.activation_func_clamp_value=1e-3")
    assert done.returncode == 1
    assert "engine-0: its log-probs differ from the learner's by" in done.stderr
    assert len([line for line in done.stdout.splitlines() if line.endswith(": ok")]) == 5


def test_ended_midway_it_leaves_nothing(tmp_path: Path) -> None:
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    argv = [sys.executable, "-m", "r1mega", "selftest", "stage.kind=sft"]
    with subprocess.Popen(argv, cwd=ROOT, env=environment) as process:
        try:
            deadline = time.monotonic() + 120
            while not list(tmp_path.glob("*/selftest/logs/learner.log")):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 128 + signal.SIGTERM
        finally:
            process.kill()
    assert not list(tmp_path.glob("r1mega-selftest-*"))
