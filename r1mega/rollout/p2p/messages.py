"""What a point-to-point transfer puts on the wire: pieces packed into messages, in one order.

Every sender has a queue of messages for every receiver, and describes it in a header beforehand. A
receiver thus needs neither plan nor table of names. The n-th messages of all queues are exchanged
before any (n+1)-th, in turns: in turn t, sender s and receiver (s + t) mod width. Hence

- a turn pairs every rank with at most one other, so all ranks send or receive at once;
- all ranks go through one global order of messages. Whoever keeps his first unfinished message
  under way cannot be part of a deadlock, whatever the library underneath does in order.

Standard library only: this also runs inside SGLang's processes.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeVar

Region = tuple[tuple[int, int], ...]  # half-open (start, stop) per dimension
T = TypeVar("T")

ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
_ALIGNMENT = 16  # a piece in a message begins where any dtype can be read
_SMALL_BYTES = 256 << 10  # larger pieces go alone: they need no packing where they lie contiguous
_PACKED_BYTES = 4 << 20  # a larger message of small pieces would only leave the caches


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle of one of the receiver's tensors, row-major on the wire."""

    tensor: str  # the receiver's name of it
    region: Region
    dtype: str  # on the wire, by torch's name

    @property
    def nbytes(self) -> int:
        return prod(stop - start for start, stop in self.region) * ITEMSIZES[self.dtype]


@dataclass(frozen=True, slots=True)
class Message:
    """Pieces, the bytes (start, stop) of each on the wire, and how many that are."""

    pieces: tuple[Piece, ...]
    spans: tuple[tuple[int, int], ...]
    size: int

    @classmethod
    def of(cls, pieces: Iterable[Piece]) -> "Message":
        pieces, spans, stop = tuple(pieces), list[tuple[int, int]](), 0
        for piece in pieces:
            start = _aligned(stop)
            stop = start + piece.nbytes
            spans.append((start, stop))
        return cls(pieces, tuple(spans), stop)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def split(rows: range, row_bytes: int, limit: int, multiple: int = 1) -> Iterator[range]:
    """``rows`` in runs of at most ``limit`` bytes, but at least of ``multiple`` rows and, up to the
    last one, of multiples of it."""
    step = max(1, limit // row_bytes // multiple) * multiple
    for start in range(rows.start, rows.stop, step):
        yield range(start, min(start + step, rows.stop))


def pack(items: Iterable[T], nbytes: Callable[[T], int], bucket_bytes: int) -> list[tuple[T, ...]]:
    """Large ones alone, then small ones together in messages of at most ``bucket_bytes``.

    In this order, since a message that has to be unpacked holds up those behind it.
    """
    limit = min(bucket_bytes, _PACKED_BYTES)
    alone: list[tuple[T, ...]] = []
    together: list[list[T]] = []
    room = 0
    for item in items:
        needed = _aligned(nbytes(item))
        if needed > min(limit, _SMALL_BYTES):
            alone.append((item,))
            continue
        if needed > room:
            together.append([])
            room = limit
        together[-1].append(item)
        room -= needed
    return alone + [tuple(bucket) for bucket in together]


def in_turn(queues: Mapping[int, Sequence[T]], turn: Callable[[int], int]) -> list[tuple[int, T]]:
    """One rank's messages to, or from, all its peers in the global order: (peer, message).

    ``turn(peer)`` is ``Turns.of`` this rank and the peer.
    """
    order = sorted(
        (n, turn(peer), peer) for peer, queue in queues.items() for n in range(len(queue))
    )
    return [(peer, queues[peer][n]) for n, _, peer in order]


@dataclass(frozen=True, slots=True)
class Turns:
    """Ranks of the group: first the senders, then the receivers."""

    senders: int
    world: int

    def of(self, sender: int, receiver: int) -> int:
        width = max(self.senders, self.world - self.senders)
        return (receiver - self.senders - sender) % width


def encode_header(queue: Sequence[Message]) -> bytes:
    """A sender's queue for one receiver."""
    return json.dumps(
        [[[p.tensor, p.region, p.dtype] for p in message.pieces] for message in queue],
        separators=(",", ":"),
    ).encode()


def decode_header(header: bytes) -> tuple[Message, ...]:
    return tuple(
        Message.of(
            Piece(tensor, tuple((start, stop) for start, stop in region), dtype)
            for tensor, region, dtype in pieces
        )
        for pieces in json.loads(header)
    )
