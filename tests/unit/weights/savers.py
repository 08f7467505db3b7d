"""Savers without a network behind them: the tensors that the table of names asks for.

``forked`` ranks are children of the test's process, so that one costs milliseconds.
"""

import os
import resource
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from r1mega.parallel.groups import Groups
from r1mega.parallel.layout import Layout
from r1mega.weights.checkpoints.checkpoint import Progress
from r1mega.weights.checkpoints.saving import Contents, Saver
from r1mega.weights.local import LocalWeights, random_region
from tests.distributed.shards import filled_shard
from tests.distributed.tiny import MODEL


def local_weights(layout: Layout, rank: int) -> LocalWeights:
    """Filled with what every rank draws alike."""
    return filled_shard(MODEL, layout, rank, random_region(1, 0.1))


def open_saver(
    checkpoints: Path, weights: LocalWeights, store: dist.Store, *, keep_last: int = 3
) -> Saver:
    """Of a process group that is open already."""
    world = dist.group.WORLD
    assert world is not None
    groups = Groups(
        layout=weights.layout,
        rank=weights.rank,
        tp=world,
        pp=world,
        cp=world,
        dp=world,
        world=world,
    )
    return Saver(
        checkpoints,
        weights,
        companions={"config.json": b"{}"},
        keep_last=keep_last,
        groups=groups,
        store=store,
        device=torch.device("cpu"),
    )


def contents(
    value: float, *, size: int = 1000, reference: list[torch.Tensor] | None = None
) -> Contents:
    return Contents(
        optimizer={
            "0/w/range": torch.tensor([0, size]),
            "0/w/param": torch.full((size,), value),
            "0/w/step": torch.tensor([value]),
        },
        rng={"cpu": torch.get_rng_state()},
        reference=reference,
    )


def at(step: int) -> Progress:
    return Progress(step=step, data_position=8 * step)


def forked(work: Callable[[], None], *, largest_file: int | None = None) -> int:
    """The process id of a child that does ``work`` and ends with status 0, or 1 if it raises.

    Where ``largest_file`` is given, writing past it fails as on a full disk.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        if largest_file is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        work()
        code = 0
    finally:
        os._exit(code)


def join(rank: int, world: int, meeting: Path) -> dist.Store:
    """A group of ``world`` forked processes, which meet in a file."""
    store = dist.FileStore(str(meeting), world)
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
    return store


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
