"""A dense model is a matter of configuration, from the command line to a Hugging Face folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from r1mega.config import Config, load
from r1mega.data.documents import load_documents
from r1mega.data.prompts import order
from r1mega.data.tokenizer import load_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
LAYERS = [
    "configs/model/tiny_qwen2.yaml",
    "data.size=64",
    "data.template=brief",
    "algorithm.sequences_per_step=8",
    "learner.precision=fp32",
    "learner.lr=1e-3",
    "stage.steps=3",
    "stage.save_every=2",
]
PP2 = ["parallel.pp=2", "cluster.learner_processes_per_node=2"]


def sft(*layers: str) -> list[dict[str, float]]:
    """``r1mega sft``: the rows of its metrics."""
    subprocess.run(
        [sys.executable, "-m", "r1mega", "sft", *layers],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"},
        check=True,
        timeout=240,
    )
    config = load([*layers, "stage.kind=sft"])
    lines = (Path(config.run.root) / config.name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def transformers_loss(folder: Path, config: Config, step: int) -> float:
    """The mean over the target tokens of the documents of ``step`` (0-based)."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(folder).eval()
    documents = load_documents(config.data, load_tokenizer(config.model.tokenizer), config.seed)
    count = config.algorithm.sequences_per_step
    losses = []
    for index in order(len(documents), config.seed, step * count, count):
        tokens = torch.tensor([documents[index].token_ids])
        with torch.no_grad():
            table = network(tokens).logits[0, :-1].log_softmax(-1)
        losses.append(-table.gather(1, tokens[0, 1:, None])[:, 0])
    return torch.cat(losses).mean().item()


def test_sft_from_the_command_line_and_back_into_transformers(tmp_path: Path) -> None:
    layers = [*LAYERS, *PP2, f"run.root={tmp_path}"]
    rows = sft(*layers)
    config = load([*layers, "stage.kind=sft"])
    checkpoint = tmp_path / config.name / "checkpoints/step_000002"
    folder = tmp_path / "hf"
    subprocess.run(
        [sys.executable, "tools/megatron_to_hf.py", checkpoint, folder],
        cwd=REPOSITORY,
        check=True,
        timeout=120,
    )
    assert rows[2]["loss"] == pytest.approx(transformers_loss(folder, config, 2), rel=1e-5)
