"""Small collectives over records and numbers. Nothing here pickles: records travel as msgpack."""

import logging
import time
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

T = TypeVar("T")

_FIRST_PAUSE_S = 0.002
_LONGEST_PAUSE_S = 0.25
_TELL_EVERY_S = 60.0

logger = logging.getLogger(__name__)


def wait_for_all(label: str) -> None:
    """Return when every rank has come to ``label``, however long that takes.

    A collective ends after its timeout, and ranks that wait for a rollout would end with it. This
    asks the job's store instead, and says who is missing once a minute. Labels are used once.
    """
    store = job_store()
    world = dist.get_world_size()
    store.set(f"{label}/{dist.get_rank()}", "here")
    arrived = store.add(label, 1)
    started = told = time.monotonic()
    pause = _FIRST_PAUSE_S
    while arrived < world:
        time.sleep(pause)
        pause = min(1.5 * pause, _LONGEST_PAUSE_S)
        arrived = store.add(label, 0)
        if (now := time.monotonic()) - told > _TELL_EVERY_S:
            missing = [rank for rank in range(world) if not store.check([f"{label}/{rank}"])]
            logger.info("%s: %.0f s, waiting for ranks %s", label, now - started, missing)
            told = now


def job_store() -> dist.Store:
    """What all ranks of the job can write to and ask, from any thread and without a collective."""
    return dist.distributed_c10d._get_default_store()


def await_keys(store: dist.Store, keys: list[str]) -> list[bytes]:
    """The values of ``keys`` once all are set, however long that takes; says what is missing."""
    started = told = time.monotonic()
    pause = _FIRST_PAUSE_S
    while not store.check(keys):
        time.sleep(pause)
        pause = min(1.5 * pause, _LONGEST_PAUSE_S)
        if (now := time.monotonic()) - told > _TELL_EVERY_S:
            missing = [key for key in keys if not store.check([key])]
            logger.info("%.0f s, waiting for %s", now - started, missing)
            told = now
    return [store.get(key) for key in keys]


@dataclass(frozen=True, slots=True)
class Team:
    """Ranks that tell each other small records; without a group this process is all of them."""

    group: ProcessGroup | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_root(self) -> bool:
        return self.group is None or self.group.rank() == 0

    def told(self, value: T, type_: Any) -> T:
        """The record of rank 0, on every rank."""
        if self.group is None:
            return value
        source = dist.get_global_rank(self.group, 0)
        return broadcast_record(value, type_, source=source, group=self.group, device=self.device)

    def gathered(self, value: T, type_: Any) -> list[T]:
        """The records of all ranks in order, on every rank."""
        if self.group is None:
            return [value]
        return gather_records(value, type_, group=self.group, device=self.device)


def broadcast_record(
    value: T | None, type_: Any, *, source: int, group: ProcessGroup, device: torch.device
) -> T:
    """The record of global rank ``source`` on every rank of the group."""
    payload = msgspec.msgpack.encode(value) if dist.get_rank() == source else b""
    size = torch.tensor([len(payload)], dtype=torch.int64, device=device)
    dist.broadcast(size, src=source, group=group)
    buffer = _bytes_tensor(payload, int(size.item()), device)
    dist.broadcast(buffer, src=source, group=group)
    return msgspec.msgpack.decode(buffer.cpu().numpy().tobytes(), type=type_)


def gather_records(value: T, type_: Any, *, group: ProcessGroup, device: torch.device) -> list[T]:
    """Every rank's record, in group order, on every rank."""
    payload = msgspec.msgpack.encode(value)
    sizes = torch.zeros(group.size(), dtype=torch.int64, device=device)
    sizes[group.rank()] = len(payload)
    dist.all_reduce(sizes, group=group)
    buffer = _bytes_tensor(payload, int(sizes.max().item()), device)
    parts = [torch.empty_like(buffer) for _ in range(group.size())]
    dist.all_gather(parts, buffer, group=group)
    return [
        msgspec.msgpack.decode(part[:size].cpu().numpy().tobytes(), type=type_)
        for part, size in zip(parts, sizes.tolist(), strict=True)
    ]


def exchange_bytes(
    outgoing: list[bytes], incoming: list[int], *, group: ProcessGroup, device: torch.device
) -> list[Tensor]:
    """``outgoing[i]`` to rank i of the group; what came from each (uint8, on the host).

    ``incoming``: how many bytes to expect from each.
    """
    sizes = [len(parcel) for parcel in outgoing]
    sent = _bytes_tensor(b"".join(outgoing), sum(sizes), device)
    received = torch.empty(sum(incoming), dtype=torch.uint8, device=device)
    dist.all_to_all_single(received, sent, incoming, sizes, group=group)
    return list(received.cpu().split(incoming))


def _bytes_tensor(payload: bytes, size: int, device: torch.device) -> Tensor:
    buffer = torch.zeros(size, dtype=torch.uint8)
    if payload:
        buffer[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    return buffer.to(device)
