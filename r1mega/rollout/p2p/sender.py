"""The sending rank of a transfer: its slices to all receivers that hold them.

Packs small slices into messages and casts them on the way; a large slice that lies contiguous in
its wire's dtype is sent from where it is. While a message is on the wire the next one is packed and
the last one hashed. Memory: two messages that have to be packed.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from r1mega.rollout.p2p.messages import (
    Message,
    Piece,
    Region,
    Turns,
    encode_header,
    in_turn,
    pack,
    split,
)
from r1mega.rollout.p2p.wire import Posted, Window, Wire, as_bytes, digest
from r1mega.weights.blocks import BLOCK
from r1mega.weights.engine_names import CODES


@dataclass(frozen=True, slots=True)
class Outgoing:
    """``name[region]`` of the sender's, to be ``piece`` at the receiver."""

    name: str
    region: Region
    piece: Piece

    @property
    def nbytes(self) -> int:
        return self.piece.nbytes


@dataclass(frozen=True, slots=True)
class Parcel:
    """A message, as its sender sees it."""

    items: tuple[Outgoing, ...]
    message: Message


Read = Callable[[Outgoing], Tensor]  # the values, in any dtype


def in_rows(item: Outgoing, limit: int) -> Iterable[Outgoing]:
    """``item`` in pieces of at most ``limit`` bytes, cut along dim 0 of the sender's tensor; FP8
    codes only between blocks, and at least one of them.

    The receiver's tensor may have further dimensions in front, of size one.
    """
    piece, rows = item.piece, range(*item.region[0])
    lead = len(piece.region) - len(item.region)
    shift = piece.region[lead][0] - rows.start
    multiple = BLOCK if piece.dtype == CODES else 1
    for part in split(rows, piece.nbytes // len(rows), limit, multiple):
        here, there = (part.start, part.stop), (part.start + shift, part.stop + shift)
        target = (*piece.region[:lead], there, *piece.region[lead + 1 :])
        yield Outgoing(item.name, (here, *item.region[1:]), replace(piece, region=target))


def queue(items: Iterable[Outgoing], bucket_bytes: int) -> list[Parcel]:
    """The messages to one receiver."""
    pieces = chain.from_iterable(in_rows(item, bucket_bytes) for item in items)
    packed = pack(pieces, lambda item: item.nbytes, bucket_bytes)
    return [Parcel(items, Message.of(item.piece for item in items)) for items in packed]


def send_all(
    wire: Wire, queues: Mapping[int, Sequence[Parcel]], read: Read, *, rank: int, turns: Turns
) -> int:
    """Send each receiver its queue; returns the bytes of weights. Raises PeerLost.

    ``queues``: by rank of the receiver in the group, none of them empty.
    """
    turn = partial(turns.of, rank)
    receivers = sorted(queues, key=turn)
    headers = {r: encode_header([parcel.message for parcel in queues[r]]) for r in receivers}
    lengths = {r: _numbers([len(headers[r])], wire) for r in receivers}
    small = _to_each(wire, lengths, "a header's length")
    small += _to_each(wire, {r: _as_tensor(headers[r], wire) for r in receivers}, "a header")
    departing = in_turn(queues, turn)
    window = Window[tuple[Posted, Tensor]](  # with the data, to keep it alive
        lambda message: message[0].wait(), wire.device
    )
    digests: dict[int, list[int]] = {receiver: [] for receiver in receivers}
    for receiver, parcel in departing:
        data, is_staged = _assemble(parcel, read, window, wire.device)
        posted = wire.send(data, receiver, parcel.message.pieces[0].tensor)
        window.add((posted, data), staged=is_staged)
        digests[receiver] += [digest(data[start:stop]) for start, stop in parcel.message.spans]
    small += _to_each(wire, {r: _numbers(digests[r], wire) for r in receivers}, "the digests")
    window.finish()
    for posted, _ in small:
        posted.wait()
    return sum(stop - start for _, parcel in departing for start, stop in parcel.message.spans)


def _assemble(
    parcel: Parcel, read: Read, window: Window[Any], device: torch.device
) -> tuple[Tensor, bool]:
    """The bytes of a message, and whether they are packed or, of a lone slice, where it lies."""
    items, message = parcel.items, parcel.message
    first = read(items[0])
    if len(items) == 1 and _is_ready(first, items[0].piece, device):
        return as_bytes(first), False
    data = window.stage(message.size)
    for item, (start, stop) in zip(items, message.spans, strict=True):
        values, dtype = first if item is items[0] else read(item), getattr(torch, item.piece.dtype)
        data[start:stop].view(dtype).view(values.shape).copy_(values)
    return data, True


def _is_ready(values: Tensor, piece: Piece, device: torch.device) -> bool:
    as_wanted = values.dtype == getattr(torch, piece.dtype) and values.device.type == device.type
    return as_wanted and values.is_contiguous()


def _to_each(wire: Wire, data: Mapping[int, Tensor], what: str) -> list[tuple[Posted, Tensor]]:
    return [(wire.send(tensor, receiver, what), tensor) for receiver, tensor in data.items()]


def _numbers(values: Sequence[int], wire: Wire) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=wire.device)


def _as_tensor(text: bytes, wire: Wire) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).to(wire.device)
