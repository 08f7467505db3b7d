"""Converting takes no more memory than a few bands, however much there is to convert."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from r1mega.config.schema import Model
from r1mega.model.hf_config import hf_config
from r1mega.weights.conversion.convert import hf_to_megatron, megatron_to_hf
from r1mega.weights.names import hf_shapes
from r1mega.weights.streams import published_dtype
from r1mega.weights.tensor_file import TensorFile
from tests.unit.weights.conversion.test_convert import Listening

TOOLS = Path(__file__).parents[4] / "tools"
MEGABYTE = 1_000_000


def private_bytes(process: int | str = "self") -> int:
    """Memory that is no file's; 0 when the process has ended."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def write_zeros(folder: Path, model: Model) -> int:
    """A Hugging Face folder that takes no disk; returns its bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config(model)))
    shapes = {name: (published_dtype(name), shape) for name, shape in hf_shapes(model).items()}
    with TensorFile.create(folder / "model.safetensors", shapes) as file:
        return sum(entry.nbytes for entry in file.entries.values())


class Watching(Listening):
    def __init__(self) -> None:
        super().__init__()
        self.peak = 0

    def progress(self, what: str, done: int, total: int) -> None:
        self.peak = max(self.peak, private_bytes())


def growth(work: Callable[[Watching], None]) -> int:
    """Private bytes that ``work`` needs at most beyond those before it, in a process of its own."""
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def run() -> None:
        torch.set_num_threads(1)
        watching, before = Watching(), private_bytes()
        work(watching)
        sender.send(watching.peak - before)

    process = context.Process(target=run)
    process.start()
    process.join(120)
    assert process.exitcode == 0
    needed: int = receiver.recv()
    return needed


def test_memory_does_not_grow_with_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("r1mega.weights.streams.BAND_BYTES", 100_000)
    model = Model(
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=4096,
        moe_intermediate_size=4096,
        num_hidden_layers=2,
    )
    size = write_zeros(tmp_path / "hf", model)
    assert size > 240 * MEGABYTE
    ours = tmp_path / "ours"
    steps: list[Callable[[Watching], None]] = [
        lambda listener: hf_to_megatron(tmp_path / "hf", ours, listener, tp=2, etp=2),
        lambda listener: megatron_to_hf(ours, tmp_path / "a", listener),
        lambda listener: megatron_to_hf(ours, tmp_path / "b", listener, dtype="fp8"),
        lambda listener: megatron_to_hf(tmp_path / "b", tmp_path / "c", listener, dtype="bf16"),
    ]
    for step in steps:
        assert growth(step) < 64 * MEGABYTE


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_256_mb_and_the_largest_tensor_are_enough(tmp_path: Path) -> None:
    model = Model(
        vocab_size=65_536,
        hidden_size=2048,
        intermediate_size=8192,
        moe_intermediate_size=1024,
        num_hidden_layers=7,
        n_routed_experts=64,
        n_group=4,
    )
    size = write_zeros(tmp_path / "hf", model)
    assert size > 20 * 256 * MEGABYTE
    largest = 2 * model.vocab_size * model.hidden_size
    commands = [
        ("hf_to_megatron.py", "hf", "ours", "tp=2", "pp=3", "ep=4"),
        ("megatron_to_hf.py", "ours", "back", "shard_gb=1"),
        ("megatron_to_hf.py", "ours", "fp8", "dtype=fp8"),
    ]
    for tool, *arguments in commands:
        process = subprocess.Popen(
            [sys.executable, TOOLS / tool, *arguments],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        peak = 0
        while process.poll() is None:
            peak = max(peak, private_bytes(process.pid))
            time.sleep(0.01)
        assert process.returncode == 0
        assert peak <= 256 * MEGABYTE + largest
        print(f"{tool} {arguments[1]}: {peak / MEGABYTE:.0f} MB for {size / MEGABYTE:.0f} MB")
    for name in ("ours", "back", "fp8"):  # pytest keeps what it finds here
        shutil.rmtree(tmp_path / name)
