"""The learner on one CUDA device equals the learner on CPU. Not run where there is no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROOT = Path(__file__).parents[2]
BASE = [
    "configs/smoke/base.yaml",
    "stage.steps=3",
    "data.size=640",
    "learner.warmup_steps=0",
    "learner.lr=1e-3",
    "cluster.learner_processes_per_node=1",
    "stage.save_every=-1",
]


def losses(root: Path, *more: str, hide_gpu: bool = False) -> list[float]:
    """The losses of three SFT steps through the command line."""
    env = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if hide_gpu else {})
    command = [sys.executable, "-m", "r1mega", "sft", *BASE, f"run.root={root}", *more]
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = (root / "smoke_base/metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize(
    ("layers", "tolerance"),
    [
        (["learner.precision=fp32"], 1e-4),
        (["learner.precision=bf16"], 2e-2),
        (["learner.precision=bf16", "learner.layer_spec=transformer_engine"], 2e-2),
    ],
    ids=["fp32 local", "bf16 local", "bf16 transformer engine"],
)
def test_cuda_equals_cpu(layers: list[str], tolerance: float, tmp_path: Path) -> None:
    reference = losses(tmp_path / "cpu", hide_gpu=True)
    on_gpu = losses(tmp_path / "cuda", "cluster.backend=cuda", *layers)
    assert on_gpu == pytest.approx(reference, rel=tolerance)
