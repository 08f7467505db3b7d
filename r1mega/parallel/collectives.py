"""Small collectives over records and numbers. Nothing here pickles: records travel as msgpack."""

from typing import Any, TypeVar

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

T = TypeVar("T")


def sum_floats(
    values: dict[str, float], group: ProcessGroup, device: torch.device
) -> dict[str, float]:
    """Sum of every value over the group; all ranks must hold the same keys."""
    total = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(total, group=group)
    return dict(zip(values, total.tolist(), strict=True))


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


def _bytes_tensor(payload: bytes, size: int, device: torch.device) -> Tensor:
    buffer = torch.zeros(size, dtype=torch.uint8)
    if payload:
        buffer[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    return buffer.to(device)
