"""The group of all learner ranks and all engine ranks, and how it comes together.

Learner rank 0 names it and invites every engine by one HTTP call, in which the engine's ranks join,
receive and verify.
"""

from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from torch.distributed import ProcessGroup

from r1mega.rollout.carrier import Failures
from r1mega.rollout.fleet import EngineHandle
from r1mega.rollout.p2p.invite import Invite
from r1mega.rollout.p2p.receiver import Invitation
from r1mega.rollout.transfer import failure_of
from r1mega.rollout.wire import join_group

_JOIN_TIMEOUT_S = 60.0
# A whole transfer may take so many timeouts of a single message: fewer than the four after which
# the collective ends in which the other learner ranks wait for rank 0, and rank 0 for the calls.
_CALL_TIMEOUTS = 3

Calls = dict[str, "Future[object]"]  # the invitations that engines are in, by URL


@dataclass(frozen=True, kw_only=True, slots=True)
class Meeting:
    """Ranks of the group: ``learners``, then ``tp`` of each of ``engines``."""

    name: str
    address: str
    port: int
    backend: str
    learners: int
    engines: tuple[EngineHandle, ...]
    tp: int
    timeout_s: float  # of one message

    @property
    def world(self) -> int:
        return self.learners + self.tp * len(self.engines)

    def rank(self, engine: int, rank: int) -> int:
        """Of an engine's rank in the group."""
        return self.learners + self.tp * engine + rank

    def engine_of(self, rank: int) -> EngineHandle:
        return self.engines[(rank - self.learners) // self.tp]

    def name_of(self, rank: int) -> str:
        part = f" rank {(rank - self.learners) % self.tp}" if self.tp > 1 else ""
        return self.engine_of(rank).name + part

    def join(self, rank: int) -> "Future[ProcessGroup]":
        """Ends when all have come."""
        pool = ThreadPoolExecutor(1)
        joining = pool.submit(
            join_group,
            address=self.address,
            port=self.port,
            rank=rank,
            world_size=self.world,
            name=self.name,
            backend=self.backend,
            join_timeout_s=_JOIN_TIMEOUT_S,
            timeout_s=self.timeout_s,
        )
        pool.shutdown(wait=False)
        return joining

    def call(self, invite: Invite, senders: Mapping[int, tuple[int, ...]]) -> Calls:
        """Invite every engine; a call ends when the engine has received all, or failed to.

        ``senders``: of each engine rank of the group.
        """
        pool = ThreadPoolExecutor(len(self.engines))
        calls: Calls = {}
        for number, engine in enumerate(self.engines):
            ranks = [self.rank(number, rank) for rank in range(self.tp)]
            invitations = [self._invitation(rank, senders.get(rank, ())) for rank in ranks]
            timeout_s = _CALL_TIMEOUTS * self.timeout_s
            calls[engine.url] = pool.submit(invite, engine, invitations, timeout_s)
        pool.shutdown(wait=False)
        return calls

    def _invitation(self, rank: int, senders: tuple[int, ...]) -> Invitation:
        return Invitation(
            address=self.address,
            port=self.port,
            group=self.name,
            backend=self.backend,
            world=self.world,
            learners=self.learners,
            receiver=self.name_of(rank),
            rank=rank,
            senders=senders,
            join_timeout_s=_JOIN_TIMEOUT_S,
            timeout_s=self.timeout_s,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """Why the engines are not all coming; no summary: they are."""

    failures: Failures = field(default_factory=dict)
    summary: str = ""


def refusal(joining: "Future[ProcessGroup]", calls: Calls) -> Refusal:
    """As soon as it is known: no call ends before all have joined, but one that fails.

    It leaves all others waiting for its engine; threads that still wait end by their timeouts.
    """
    pending: list[Future[Any]] = [joining, *calls.values()]
    wait(pending, return_when=FIRST_COMPLETED)
    failures = {url: str(error) for url, call in calls.items() if (error := failure_of(call))}
    broken = failure_of(joining)
    if not failures and broken is None:
        return Refusal()
    summary = next(iter(failures.values()), f"no group with the engines: {broken}")
    return Refusal(failures=failures, summary=summary)
