"""A checkpoint continues bit for bit, and what is wrong with one is said in a sentence."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from r1mega.config import load
from r1mega.weights.checkpoints import checkpoint
from tests.distributed.launch import run_ranks

AXES = ["parallel.tp=2", "parallel.pp=2", "parallel.ep=2", "cluster.learner_processes_per_node=4"]
DENSE_AXES = ["parallel.tp=2", "parallel.pp=2", "cluster.learner_processes_per_node=4"]
CP_AXES = ["parallel.cp=2", "parallel.ep=2", "cluster.learner_processes_per_node=2"]
GATHER = [
    "learner.overlap_grad_reduce=true",
    "learner.overlap_param_gather=true",
    "learner.bucket_parameters=2000",
]
DENSE = ["configs/model/tiny_qwen2.yaml"]
MOE = ["learner.expert_bias_update_rate=1e-3"]
MTP = ["model.num_nextn_predict_layers=1", "learner.mtp_loss_weight=0.3"]
ONE_RANK = ["cluster.learner_processes_per_node=1"]
BASE = [
    "stage.kind=sft",
    "model.vocab_size=64",
    "data.size=64",
    "data.template=brief",
    "algorithm.sequences_per_step=8",
    "learner.lr=1e-3",
    "stage.save_every=2",
    "stage.keep_last=9",
]
VOLATILE = ("time", "learner/tokens_per_s")


def train(layers: list[str]) -> None:
    """Runs on every rank."""
    from r1mega.config import load
    from r1mega.parallel.backend import open_backend

    config = load(layers)
    backend = open_backend("cpu")
    from r1mega.stages import sft

    assert sft.main(config, backend) == 0


def run(root: Path, *more: str, axes: list[str] = ONE_RANK) -> Path:
    layers = [*BASE, *axes, f"run.root={root}", *more]
    world = load(layers).cluster.learner_processes_per_node
    run_ranks(__name__, "train", world=world, layers=layers)
    return root / "run"


def facts(run_folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(VOLATILE)} for row in rows]


def digests(folder: Path) -> dict[str, str]:
    files = json.loads((folder / "manifest.json").read_text())["files"]
    return {name: entry["xxh3_128"] for name, entry in files.items()}


@pytest.mark.parametrize(
    ("axes", "more"),
    [
        (AXES, ["learner.precision=fp32", *MOE, *MTP]),
        (AXES, ["learner.precision=bf16", *MOE]),
        (DENSE_AXES, ["learner.precision=fp32", *DENSE]),
        (CP_AXES, ["learner.precision=bf16", *MOE, *GATHER]),
    ],
    ids=["fp32 with MTP layers", "bf16", "dense with a tied head", "bf16, cp, overlap"],
)
def test_resume_equals_uninterrupted_bit_for_bit(
    axes: list[str], more: list[str], tmp_path: Path
) -> None:
    straight = run(tmp_path / "a", *more, "stage.steps=4", axes=axes)
    # As if the run had been killed before its second checkpoint was written.
    shutil.copytree(straight, tmp_path / "b/run")
    shutil.rmtree(tmp_path / "b/run/checkpoints/step_000004")
    resumed = run(tmp_path / "b", *more, "stage.steps=4", axes=axes)
    assert facts(resumed) == facts(straight)
    assert len(facts(straight)) == 4
    last = "checkpoints/step_000004"
    assert digests(resumed / last) == digests(straight / last)
    assert digests(resumed / last) != digests(resumed / "checkpoints/step_000002")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one rank with checkpoints at steps 2 and 4."""
    return run(tmp_path_factory.mktemp("finished"), "learner.precision=fp32", "stage.steps=4")


def test_another_layout_starts_from_the_weights(finished: Path, tmp_path: Path) -> None:
    """The first loss under tp2 pp2 ep2 is the loss one rank would have had."""
    init = f"model.init={finished / 'checkpoints/step_000004'}"
    one = facts(run(tmp_path / "one", init, "learner.precision=fp32", "stage.steps=1"))
    four = facts(run(tmp_path / "four", init, "learner.precision=fp32", "stage.steps=1", axes=AXES))
    assert four[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-5)
    assert four[0]["learner/grad_norm"] == pytest.approx(one[0]["learner/grad_norm"], rel=1e-5)


def test_a_damaged_checkpoint_is_skipped_with_the_reason(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "checkpoints"
    shutil.copytree(finished / "checkpoints", copy)
    shard = copy / "step_000004" / "weights-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-7] ^= 1  # one flipped bit in the last tensor
    shard.write_bytes(data)
    folder, skipped = checkpoint.newest(checkpoint.saved(copy))
    assert folder == copy / "step_000002"
    assert len(skipped) == 1
    assert "weights-00000.safetensors is damaged" in skipped[0]


def test_what_a_kill_leaves_behind_is_not_a_checkpoint(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "checkpoints/step_000002", tmp_path / ".step_000002.partial")
    assert checkpoint.newest(checkpoint.saved(tmp_path)) == (None, [])


def test_resume_refuses_another_network(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    sentence = "is a checkpoint of another model: hidden_size was 64, is 32"
    with pytest.raises(AssertionError, match=sentence):
        run(tmp_path, "learner.precision=fp32", "stage.steps=5", "model.hidden_size=32")
