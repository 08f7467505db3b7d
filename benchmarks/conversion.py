"""Conversion in both directions, audit included, against ``cp -r`` of the same data.

1.6 GB of bf16 in DeepSeek-V3's shape, 1457 tensors; to tp2 pp2 ep4 and back to shards of 0.2 GB.
In memory (/dev/shm) the plain ``cp -r`` is the measure. On disk the source is cold, as one that is
larger than memory always is, and ``cp -r`` gets an fsync of every file behind it, because a
conversion ends with everything on the disk. Runs alternate; ratios are taken within a round, and
the median of ROUNDS of them is told. Time begins when Python and torch are there, which takes
seconds by itself.

``cp`` moves every byte once, on one core. A conversion moves it in, digests it, moves it out, moves
it back in and digests it twice more (``cpu`` says what that costs): four cores hide it in memory,
two cannot. One JSON line.
"""

import gc
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from r1mega.config.schema import Model
from r1mega.model.hf_config import hf_config
from r1mega.weights.conversion.convert import hf_to_megatron, megatron_to_hf
from r1mega.weights.names import hf_shapes
from r1mega.weights.regions import whole
from r1mega.weights.streams import published_dtype
from r1mega.weights.tensor_file import DTYPES, TensorFile

ROUNDS = 5
AXES = {"tp": 2, "pp": 2, "ep": 4}
SHARD_BYTES = 200_000_000  # as many shards as threads and more, as large models have
MODEL = Model(
    vocab_size=32_768,
    hidden_size=1_024,
    intermediate_size=4_096,
    moe_intermediate_size=512,
    num_hidden_layers=8,
    num_attention_heads=16,
    q_lora_rank=384,
    kv_lora_rank=256,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    n_routed_experts=64,
)


class Memory:
    """Listens to a conversion, and looks at this process's private memory meanwhile."""

    def __init__(self) -> None:
        self.peak_kb = 0

    def note(self, sentence: str) -> None:
        raise RuntimeError(sentence)

    def progress(self, what: str, done: int, total: int) -> None:
        self.peak_kb = max(self.peak_kb, private_kb())


@dataclass(frozen=True)
class Cost:
    """Of one run."""

    seconds: float
    cpu_seconds: float


def main() -> None:
    torch.set_num_threads(1)
    gc.freeze()
    result: dict[str, object] = {"benchmark": "conversion", "cores": os.cpu_count()}
    result["private_mb_of_imports"] = private_kb() // 1000
    memory = Memory()
    for name, parent in (("memory", Path("/dev/shm")), ("disk", Path.cwd())):
        with tempfile.TemporaryDirectory(dir=parent) as folder:
            measured = measure(Path(folder), memory, cold=name == "disk")
            result |= {f"{name}_{key}": value for key, value in measured.items()}
    result["private_mb_peak"] = memory.peak_kb // 1000
    print(json.dumps(result))


def measure(folder: Path, memory: Memory, *, cold: bool) -> dict[str, float]:
    source, ours, hf, copied = (folder / name for name in ("source", "ours", "hf", "copied"))
    size = write_source(source)
    runs: dict[str, tuple[Path, Path, Callable[[], None]]] = {
        "cp": (source, copied, lambda: copy(source, copied, sync=cold)),
        "to_megatron": (source, ours, lambda: hf_to_megatron(source, ours, memory, **AXES)),
        "to_hf": (ours, hf, lambda: megatron_to_hf(ours, hf, memory, shard_bytes=SHARD_BYTES)),
    }
    rounds: list[dict[str, Cost]] = []
    for _ in range(ROUNDS):
        costs = {}
        for name, (read, _, run) in runs.items():
            if cold:
                evict(read)
            costs[name] = cost(run)
        rounds.append(costs)
        for written in (copied, ours, hf):
            shutil.rmtree(written)
    result = {}
    for name in runs:
        seconds = median(costs[name].seconds for costs in rounds)
        result[f"{name}_gb_per_s"] = round(size / seconds / 1e9, 2)
    for name in ("to_megatron", "to_hf"):
        ratio = median(costs[name].seconds / costs["cp"].seconds for costs in rounds)
        cpu = median(costs[name].cpu_seconds / costs["cp"].cpu_seconds for costs in rounds)
        result |= {f"{name}_over_cp": round(ratio, 2), f"{name}_cpu_over_cp": round(cpu, 2)}
    return result


def write_source(folder: Path) -> int:
    """Bytes of it; five shards."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config(MODEL, dtype="bfloat16")))
    shapes = {name: (published_dtype(name), shape) for name, shape in hf_shapes(MODEL).items()}
    names = list(shapes)
    weight_map = {}
    for shard in range(5):
        held = names[shard * len(names) // 5 : (shard + 1) * len(names) // 5]
        path = folder / f"model-{shard}.safetensors"
        with TensorFile.create(path, {name: shapes[name] for name in held}) as file:
            for name in held:
                dtype, shape = shapes[name]
                file.write(name, whole(shape), torch.randn(shape).to(DTYPES[dtype]))
            file.sync()
        weight_map |= dict.fromkeys(held, path.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(path.stat().st_size for path in folder.iterdir())


def copy(source: Path, target: Path, *, sync: bool) -> None:
    subprocess.run(["cp", "-r", source, target], check=True)
    for path in target.iterdir() if sync else ():
        with path.open("rb") as file:
            os.fsync(file)


def evict(folder: Path) -> None:
    """Forget the pages of its files, which are on disk."""
    for path in folder.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cost(run: Callable[[], None]) -> Cost:
    started, before = time.perf_counter(), cpu_seconds()
    run()
    return Cost(time.perf_counter() - started, cpu_seconds() - before)


def cpu_seconds() -> float:
    """Of this process and of those it has waited for."""
    return sum(os.times()[:4])


def private_kb() -> int:
    """Memory of this process that is no file's."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()
