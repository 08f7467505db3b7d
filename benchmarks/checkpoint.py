"""Saving and loading a checkpoint of one rank against raw file access and against torch's DCP.

The rank has bf16 weights of a small DeepSeek-V3 and the optimizer's fp32 masters and moments, 14
bytes per parameter. ``raw`` writes as many bytes to one file in blocks of 8 MiB and syncs it, and
reads them back; DCP (torch.distributed.checkpoint) saves and loads the same tensors. Everything
ends with the bytes on the disk; reading follows on emptying the page cache of the files, where
there is a disk behind it. DCP checks nothing; ours digests what it writes, and verifies and then
reads what it loads. A stall is how long training waits: for all of it, or for the private copy.

Every way takes its turn in each of ROUNDS rounds; the best of each counts. One JSON line, of
/dev/shm and of the folder given (default: the working directory).
"""

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from r1mega.config import schema
from r1mega.parallel.groups import Groups
from r1mega.parallel.layout import Layout
from r1mega.weights.checkpoints.checkpoint import Progress, read_state, step_folder
from r1mega.weights.checkpoints.flat_ranges import tensors
from r1mega.weights.checkpoints.manifest import verify
from r1mega.weights.checkpoints.saved_optimizer import ELEMENTS, SavedOptimizer
from r1mega.weights.checkpoints.saving import Contents, Saver
from r1mega.weights.holders import holders
from r1mega.weights.local import LocalWeights
from r1mega.weights.names import Spec, parameter_slices
from r1mega.weights.slices import SliceReader

ROUNDS = 5
BLOCK = 8 << 20
MODEL = schema.Model(
    vocab_size=16_384,
    hidden_size=512,
    intermediate_size=2048,
    num_hidden_layers=8,
    moe_intermediate_size=512,
    n_routed_experts=8,
)
Optimizer = dict[str, Tensor]


def main() -> None:
    torch.set_num_threads(1)
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    weights = make_weights()
    optimizer = make_optimizer(weights)
    disk = Path(sys.argv[1]) if len(sys.argv) > 1 else Path.cwd()
    result: dict[str, object] = {
        "benchmark": "checkpoint",
        "gigabytes": round(size(weights, optimizer) / 1e9, 3),
    }
    for name, folder in (("tmpfs", Path("/dev/shm")), ("disk", disk)):
        with tempfile.TemporaryDirectory(dir=folder, prefix="checkpoint-") as place:
            result[name] = measure(weights, optimizer, Path(place), store, cold=name == "disk")
    print(json.dumps(result))


def measure(
    weights: LocalWeights, optimizer: Optimizer, place: Path, store: dist.Store, *, cold: bool
) -> dict[str, float]:
    gigabytes = size(weights, optimizer) / 1e9
    saver = open_saver(place / "r1mega", weights, store)
    buffer = torch.ones(size(weights, optimizer), dtype=torch.uint8)
    times: dict[str, list[float]] = {}
    for number in range(ROUNDS):
        raw(times, place / "raw", buffer, cold=cold)
        ours(times, saver, place / "r1mega", number, weights, optimizer, cold=cold)
        theirs(times, place / "dcp", {"weights": weights.tensors[0], "optimizer": optimizer}, cold)
    best = {what: min(seconds) for what, seconds in times.items()}
    speeds = {w: round(gigabytes / best[w], 2) for w in best if "stall" not in w}
    return {f"{what}_gb_s": speed for what, speed in speeds.items()} | {
        "save_over_raw": round(best["raw_save"] / best["save"], 3),
        "save_over_dcp": round(best["dcp_save"] / best["save"], 3),
        "load_over_raw": round(best["raw_load"] / best["load"], 3),
        "load_over_dcp": round(best["dcp_load"] / best["load"], 3),
        "first_stall_s": round(times["stall"][0], 4),
        "stall_s": round(best["stall"], 4),
        "dcp_stall_s": round(best["dcp_stall"], 4),
        "stall_over_save": round(best["stall"] / best["save"], 4),
        "stall_over_dcp_stall": round(best["stall"] / best["dcp_stall"], 4),
    }


def raw(times: dict[str, list[float]], path: Path, buffer: Tensor, *, cold: bool) -> None:
    path.unlink(missing_ok=True)
    os.sync()
    with timed(times, "raw_save"):
        write_raw(path, buffer)
    empty_cache(path.parent, cold)
    with timed(times, "raw_load"):
        read_raw(path, buffer)


def ours(
    times: dict[str, list[float]],
    saver: Saver,
    checkpoints: Path,
    number: int,
    weights: LocalWeights,
    optimizer: Optimizer,
    *,
    cold: bool,
) -> None:
    contents = Contents(optimizer=optimizer, rng={}, reference=None)
    shutil.rmtree(step_folder(checkpoints, number - 1), ignore_errors=True)
    os.sync()
    with timed(times, "save"):
        with timed(times, "stall"):
            saver.save(Progress(step=number, data_position=0), contents)
        saver.finish()
    folder = step_folder(checkpoints, number)
    empty_cache(folder, cold)
    with timed(times, "load"):
        verify(folder)
        with timed(times, "load_unverified"):
            load(folder, weights, optimizer)


def theirs(times: dict[str, list[float]], folder: Path, state: Any, cold: bool) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.sync()
    with timed(times, "dcp_save"):
        dcp.save(state, checkpoint_id=folder)
    empty_cache(folder, cold)
    with timed(times, "dcp_load"):
        dcp.load(state, checkpoint_id=folder)
    shutil.rmtree(folder)
    os.sync()
    with timed(times, "dcp_async_save"):
        with timed(times, "dcp_stall"):
            future: Any = dcp.async_save(state, checkpoint_id=folder)
        future.result()


@contextmanager
def timed(times: dict[str, list[float]], what: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    times.setdefault(what, []).append(time.perf_counter() - started)


def make_weights() -> LocalWeights:
    """The Megatron tensors of a whole model, in bf16."""
    layout = Layout(world=1)
    slices = parameter_slices(MODEL, layout, 0)
    found = tensors(slices)
    return LocalWeights(
        model=MODEL,
        layout=layout,
        spec=Spec(),
        rank=0,
        slices=tuple(slices),
        tensors=({name: random(name, t.shape) for (_, name), t in found.items()},),
        holders=holders(MODEL, layout),
    )


def random(name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, dtype=torch.float32 if name.endswith("bias") else torch.bfloat16)


def make_optimizer(weights: LocalWeights) -> Optimizer:
    optimizer: Optimizer = {}
    for name, tensor in weights.tensors[0].items():
        optimizer[f"0/{name}/range"] = torch.tensor([0, tensor.numel()])
        optimizer[f"0/{name}/step"] = torch.ones(1)
        for kind in ELEMENTS:
            optimizer[f"0/{name}/{kind}"] = torch.randn(tensor.numel())
    return optimizer


def size(weights: LocalWeights, optimizer: Optimizer) -> int:
    return sum(t.nbytes for t in (*weights.tensors[0].values(), *optimizer.values()))


def open_saver(checkpoints: Path, weights: LocalWeights, store: dist.Store) -> Saver:
    world = dist.group.WORLD
    assert world is not None
    groups = Groups(
        layout=weights.layout, rank=0, tp=world, pp=world, cp=world, dp=world, world=world
    )
    return Saver(
        checkpoints,
        weights,
        companions={},
        keep_last=ROUNDS,
        groups=groups,
        store=store,
        device=torch.device("cpu"),
    )


def load(folder: Path, weights: LocalWeights, optimizer: Optimizer) -> None:
    """As a rank does that resumes."""
    with SliceReader(folder) as reader:
        weights.fill(reader.read)
    with SavedOptimizer(folder, read_state(folder), weights) as saved:
        for name, tensor in weights.tensors[0].items():
            values = saved.read((0, name), (0, tensor.numel()))
            for kind in ELEMENTS:
                optimizer[f"0/{name}/{kind}"].copy_(values[kind])


def write_raw(path: Path, buffer: Tensor) -> None:
    view = buffer.numpy().data
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(view), BLOCK):
            file.write(view[start : start + BLOCK])
        os.fsync(file.fileno())


def read_raw(path: Path, buffer: Tensor) -> None:
    view = buffer.numpy().data
    with path.open("rb", buffering=0) as file:
        for start in range(0, len(view), BLOCK):
            file.readinto(view[start : start + BLOCK])


def empty_cache(folder: Path, cold: bool) -> None:
    for path in folder.rglob("*") if cold else ():
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
