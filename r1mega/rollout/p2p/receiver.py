"""The receiving rank of a transfer: any process that holds tensors by name.

Joins the group it is invited to, learns from each sender's header what will come, writes it into
its tensors and compares every digest. What does not fit, or is not what was sent, is received to
the end and reported to learner rank 0, so that nobody waits; a lost peer ends it at once, and
leaving the group tells all others. Memory: two messages that cannot be received in place.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from r1mega.rollout.p2p.messages import (
    Message,
    Piece,
    Turns,
    decode_header,
    in_turn,
)
from r1mega.rollout.p2p.wire import PeerLost, Posted, Window, Wire, as_bytes, digest, wire_device
from r1mega.rollout.wire import join_group

REPORT_BYTES = 1024
GROUP_PREFIX = "r1mega-p2p-"


class ReceiveFailed(Exception):
    """One sentence; the tensors are half written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Invitation:
    """What a receiving rank has to know. The learner's ranks come first in the group."""

    address: str
    port: int
    group: str
    backend: str
    world: int
    learners: int
    receiver: str  # its name in messages: engine-0 rank 3
    rank: int  # of this receiver in the group
    senders: tuple[int, ...]  # the learner ranks that have something for it
    join_timeout_s: float
    timeout_s: float

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str) -> "Invitation":
        fields = json.loads(text)
        return cls(**{**fields, "senders": tuple(fields["senders"])})


def receive(tensors: Mapping[str, Tensor], invitation: Invitation) -> None:
    """Write what the senders have for this rank into ``tensors``.

    Raises ReceiveFailed with a sentence; what did not break the group, learner rank 0 gets to know.
    """
    try:
        wire = _join(invitation)
        incoming = _Incoming(wire, invitation, tensors)
        incoming.receive_all()
        fault = f"{invitation.receiver}: {incoming.fault}" if incoming.fault else ""
        wire.send(_report(fault, wire.device), 0, "the report").wait()
    except (PeerLost, RuntimeError, ValueError) as error:  # RuntimeError: a join's
        leave(invitation.group)
        raise ReceiveFailed(f"{invitation.receiver}: {error}") from error
    if fault:
        raise ReceiveFailed(fault)


def leave(name: str) -> None:
    """Close this process's connections of the group ``name``, if it is in it."""
    for group in [group for group, held in c10d._world.pg_names.items() if held == name]:
        dist.destroy_process_group(group)


def read_report(report: Tensor) -> str:
    """The fault that a receiver reported, or nothing."""
    return bytes(report.tolist()).rstrip(b"\0").decode(errors="replace")


def _report(fault: str, device: torch.device) -> Tensor:
    text = fault.encode()[:REPORT_BYTES].ljust(REPORT_BYTES, b"\0")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)


def _join(invitation: Invitation) -> Wire:
    """The group of that name if this process is in it, or else a new one in place of older ones."""
    held = {str(name): group for group, name in c10d._world.pg_names.items()}
    group = held.get(invitation.group)
    if group is None:
        for name in [name for name in held if name.startswith(GROUP_PREFIX)]:
            leave(name)
        group = join_group(
            address=invitation.address,
            port=invitation.port,
            rank=invitation.rank,
            world_size=invitation.world,
            name=invitation.group,
            backend=invitation.backend,
            join_timeout_s=invitation.join_timeout_s,
            timeout_s=invitation.timeout_s,
        )
        dist.barrier(group)  # NCCL wants all ranks once before operations of a few of them
    return Wire(group, wire_device(invitation.backend), lambda rank: f"learner rank {rank}")


@dataclass(frozen=True, slots=True)
class _Arrival:
    """A message under way."""

    posted: Posted
    sender: int
    message: Message
    data: Tensor
    in_place: bool  # data is the receiver's own tensor


class _Incoming:
    """One transfer. ``fault`` is the first thing that was wrong and broke nothing."""

    def __init__(self, wire: Wire, invitation: Invitation, tensors: Mapping[str, Tensor]) -> None:
        self.fault = ""
        self._wire = wire
        self._tensors = tensors
        turns = Turns(invitation.learners, invitation.world)
        self._turn = partial(turns.of, receiver=invitation.rank)
        self._senders = sorted(invitation.senders, key=self._turn)
        self._digests: dict[int, list[int]] = {sender: [] for sender in self._senders}

    def receive_all(self) -> None:
        queues = self._headers()
        window = Window(self._take, self._wire.device)
        for sender, message in in_turn(queues, self._turn):
            place = self._in_place(message)
            data = window.stage(message.size) if place is None else place
            posted = self._wire.receive(data, sender, message.pieces[0].tensor)
            arrival = _Arrival(posted, sender, message, data, place is not None)
            window.add(arrival, staged=place is None)
        counts = {sender: len(_pieces(queue)) for sender, queue in queues.items()}
        digests = self._from_each(counts, torch.int64, "the digests")
        window.finish()
        self._compare_digests(queues, digests())

    def _headers(self) -> dict[int, tuple[Message, ...]]:
        """What each sender is going to send; every piece that does not fit here is a fault."""
        one = dict.fromkeys(self._senders, 1)
        lengths = self._from_each(one, torch.int64, "a header's length")()
        sizes = {sender: int(length.item()) for sender, length in lengths.items()}
        headers = self._from_each(sizes, torch.uint8, "a header")()
        queues = {s: decode_header(header.cpu().numpy().tobytes()) for s, header in headers.items()}
        for sender, queue in queues.items():
            for piece in _pieces(queue):
                if (misfit := self._misfit(piece)) is not None:
                    self._note(f"learner rank {sender} sends what does not fit: {misfit}")
        return queues

    def _from_each(
        self, counts: Mapping[int, int], dtype: torch.dtype, what: str
    ) -> Callable[[], dict[int, Tensor]]:
        """So many numbers from each sender; the call that waits for them."""
        data = {s: torch.empty(counts[s], dtype=dtype, device=self._wire.device) for s in counts}
        under_way = [self._wire.receive(data[sender], sender, what) for sender in data]

        def wait() -> dict[int, Tensor]:
            for posted in under_way:
                posted.wait()
            return data

        return wait

    def _misfit(self, piece: Piece) -> str | None:
        tensor = self._tensors.get(piece.tensor)
        if tensor is None:
            return f"there is no tensor {piece.tensor!r} here"
        inside = len(piece.region) == tensor.dim() and all(
            0 <= start < stop <= rows
            for (start, stop), rows in zip(piece.region, tensor.shape, strict=True)
        )
        return (
            None
            if inside
            else f"{piece.tensor} has shape {list(tensor.shape)} here, no {piece.region}"
        )

    def _place(self, piece: Piece) -> Tensor:
        return self._tensors[piece.tensor].detach()[
            tuple(slice(start, stop) for start, stop in piece.region)
        ]

    def _in_place(self, message: Message) -> Tensor | None:
        """The memory that a message can be received in: that of its only piece."""
        (piece, *more) = message.pieces
        if more or self.fault:
            return None
        place = self._place(piece)
        fits = place.is_contiguous() and place.dtype == getattr(torch, piece.dtype)
        return as_bytes(place) if fits and place.device.type == self._wire.device.type else None

    def _take(self, arrival: "_Arrival") -> None:
        """Finish a message: hash it as it came, and put it where it belongs."""
        arrival.posted.wait()
        message = arrival.message
        for piece, (start, stop) in zip(message.pieces, message.spans, strict=True):
            values = arrival.data[start:stop]
            self._digests[arrival.sender].append(digest(values))
            if not arrival.in_place and not self.fault:
                place = self._place(piece)
                place.copy_(values.view(getattr(torch, piece.dtype)).view(place.shape))

    def _compare_digests(
        self, queues: Mapping[int, Sequence[Message]], digests: Mapping[int, Tensor]
    ) -> None:
        for sender, sent in digests.items():
            pieces = _pieces(queues[sender])
            for piece, mine, his in zip(pieces, self._digests[sender], sent.tolist(), strict=True):
                if mine != his:
                    self._note(
                        f"{piece.tensor} {piece.region} is not what learner rank {sender} sent"
                    )

    def _note(self, fault: str) -> None:
        self.fault = self.fault or fault


def _pieces(queue: Sequence[Message]) -> list[Piece]:
    return [piece for message in queue for piece in message.pieces]
