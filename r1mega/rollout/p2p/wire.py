"""Bytes between the ranks of one group: posted, waited for, hashed; errors name the peer.

On GPUs every operation is a batch of its own: NCCL then uses the group's one communicator and does
not make one for every pair.
"""

import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

T = TypeVar("T")
_UNDER_WAY = 256


class PeerLost(Exception):
    """One sentence: what did not pass between us and which rank of the group, and why."""

    def __init__(self, peer: int, sentence: str) -> None:
        super().__init__(sentence)
        self.peer = peer


@dataclass(frozen=True, slots=True)
class Posted:
    """A transfer under way; its bytes are not to be touched before ``wait`` returns."""

    work: dist.Work
    peer: int
    expected: str

    def wait(self) -> None:
        """Raises PeerLost when the peer is gone or the group's timeout is over."""
        try:
            self.work.wait()
        except RuntimeError as error:  # torch.distributed's, for both
            raise PeerLost(self.peer, f"{self.expected}: {reason(error)}") from error


@dataclass(frozen=True, slots=True)
class Wire:
    """One rank's end of the group; ``name_of`` says who another rank is."""

    group: dist.ProcessGroup
    device: torch.device  # of what the group carries
    name_of: Callable[[int], str]

    def send(self, data: Tensor, peer: int, what: str) -> Posted:
        return self._post(dist.isend, data, peer, f"{what} did not get to {self.name_of(peer)}")

    def receive(self, data: Tensor, peer: int, what: str) -> Posted:
        return self._post(dist.irecv, data, peer, f"{what} did not come from {self.name_of(peer)}")

    def _post(self, way: Callable[..., object], data: Tensor, peer: int, expected: str) -> Posted:
        try:
            if self.device.type == "cpu":  # gloo knows no batches; going round them is 10x as fast
                direct = self.group.send if way is dist.isend else self.group.recv
                work = direct([data], peer, 0)
            else:
                operation = dist.P2POp(way, data, group=self.group, group_peer=peer)
                (work,) = dist.batch_isend_irecv([operation])
        except RuntimeError as error:
            raise PeerLost(peer, f"{expected}: {reason(error)}") from error
        return Posted(work, peer, expected)


class Window(Generic[T]):
    """Messages under way, oldest first: at most two of those that are staged.

    Those that are not take no memory; that they are many spares waking up for each.

    While one staged message is on the wire, another one is packed or unpacked.
    """

    def __init__(self, finish: Callable[[T], object], device: torch.device) -> None:
        """``finish`` waits for a message."""
        self._finish = finish
        self._staging = [torch.empty(0, dtype=torch.uint8, device=device)] * 2
        self._under_way: deque[tuple[T, bool]] = deque()
        self._num_staged = 0

    def stage(self, size: int) -> Tensor:
        """Memory for the next message."""
        while sum(staged for _, staged in self._under_way) == len(self._staging):
            self._finish(self._under_way.popleft()[0])
        self._num_staged += 1
        which = self._num_staged % len(self._staging)
        if len(self._staging[which]) < size:
            self._staging[which] = self._staging[which].new_empty(size)
        return self._staging[which][:size]

    def add(self, message: T, *, staged: bool) -> None:
        if len(self._under_way) == _UNDER_WAY:
            self._finish(self._under_way.popleft()[0])
        self._under_way.append((message, staged))

    def finish(self) -> None:
        while self._under_way:
            self._finish(self._under_way.popleft()[0])


def wire_device(backend: str) -> torch.device:
    """What a group of this backend carries; the calling process has chosen its GPU."""
    return torch.device("cuda" if backend == "nccl" else "cpu")


def as_bytes(values: Tensor) -> Tensor:
    """A contiguous tensor's memory."""
    return values.reshape(-1).view(torch.uint8)


def digest(data: Tensor) -> int:
    """XXH3 (64 bits) of bytes, as a signed number."""
    value: int = xxhash.xxh3_64_intdigest(data.cpu().numpy().data)
    return value - (1 << 64) if value >> 63 else value


def reason(error: RuntimeError) -> str:
    """Without the source line that gloo begins with and the advice that it ends with."""
    return re.sub(r"^\[\S+\] ", "", str(error)).split(". ")[0]
