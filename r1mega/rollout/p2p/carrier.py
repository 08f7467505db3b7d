"""A ``Carrier``: each slice once, from a learner rank to the engine rank that is to hold it.

Every learner rank sends its part of the reshard plan over a group with all engine ranks, which is
kept while the engines stay the same; the engines verify what comes and report to rank 0. Whoever
loses a peer leaves the group: the closed connections end everybody else's wait.
"""

import uuid
from dataclasses import dataclass

import torch
import torch.distributed as dist

from r1mega.parallel.collectives import Team
from r1mega.rollout.carrier import Carried, CarryFailed, Failures, post_all
from r1mega.rollout.fleet import EngineHandle
from r1mega.rollout.p2p.invite import Invite
from r1mega.rollout.p2p.meeting import Calls, Meeting, Refusal, refusal
from r1mega.rollout.p2p.messages import Turns
from r1mega.rollout.p2p.outbox import Outbox
from r1mega.rollout.p2p.receiver import GROUP_PREFIX, REPORT_BYTES, read_report
from r1mega.rollout.p2p.sender import Outgoing, Parcel, queue, send_all
from r1mega.rollout.p2p.wire import PeerLost, Wire, reason, wire_device
from r1mega.system import processes
from r1mega.weights.engine_names import EngineLayout
from r1mega.weights.local import LocalWeights, wire_dtype
from r1mega.weights.reshard import plan


@dataclass(frozen=True, slots=True)
class _Share:
    """What this rank has for each engine rank, and who has something for it: ranks of the group."""

    queues: dict[int, list[Parcel]]
    senders: dict[int, tuple[int, ...]]


class PointToPoint:
    """Every rank of the learner has one and calls it alike; ``layout`` is each engine's."""

    def __init__(
        self,
        weights: LocalWeights,
        layout: EngineLayout,
        invite: Invite,
        *,
        team: Team,
        bucket_bytes: int,
        host: str = "127.0.0.1",
        backend: str = "gloo",
        timeout_s: float = 600.0,
    ) -> None:
        self._weights = weights
        self._layout = layout
        self._invite = invite
        self._outbox = Outbox(weights)
        self._team = team
        self._bucket_bytes = bucket_bytes
        self._host = host
        self._backend = backend
        self._timeout_s = timeout_s
        self._shares: dict[int, _Share] = {}  # by number of engines
        self._meeting: Meeting | None = None
        self._wire: Wire | None = None

    def carry(self, engines: tuple[EngineHandle, ...], version: int) -> Carried:
        self._weights.settle()
        meeting = self._meet(engines)
        share = self._share(meeting)
        calls = self._open(meeting, share)
        sent, failures = 0, Failures()
        try:
            sent, failures = self._exchange(meeting, share)
        except PeerLost as lost:
            failures = {meeting.engine_of(lost.peer).url: str(lost)}
        if failures:
            self.abandon()  # before waiting for the engines, which wait for us
        failures |= {url: str(error) for url, call in calls.items() if (error := call.exception())}
        if failures:
            raise CarryFailed(failures)
        if self._team.is_root:
            self._close(engines, version)
        return Carried(bytes=sent, point_to_point_bytes=sent)

    def abandon(self) -> None:
        """Close our connections: gloo does so when the last reference to the group is gone."""
        wire, self._wire, self._meeting = self._wire, None, None
        if wire is not None:
            dist.destroy_process_group(wire.group)

    def _meet(self, engines: tuple[EngineHandle, ...]) -> Meeting:
        """The meeting there is with exactly ``engines``, or a new one that rank 0 names."""
        if self._meeting is None or self._meeting.engines != engines:
            self.abandon()
            meeting = Meeting(
                name=f"{GROUP_PREFIX}{uuid.uuid4().hex[:12]}",
                address=self._host,
                port=processes.free_port(self._host) if self._team.is_root else 0,
                backend=self._backend,
                learners=self._weights.layout.world,
                engines=engines,
                tp=self._layout.tp,
                timeout_s=self._timeout_s,
            )
            self._meeting = self._team.told(meeting, Meeting)
        return self._meeting

    def _share(self, meeting: Meeting) -> _Share:
        count = len(meeting.engines)
        if count not in self._shares:
            weights, items = self._weights, dict[int, list[Outgoing]]()
            routes = plan(
                weights.model,
                weights.layout,
                [self._layout] * count,
                spec=weights.spec,
                itemsize=wire_dtype("", weights).itemsize,
            )
            for transfer in routes.sends(weights.rank):
                rank = meeting.rank(transfer.engine, transfer.rank)
                items.setdefault(rank, []).append(self._outbox.item(transfer))
            receivers = self._team.gathered(sorted(items), list[int])
            self._shares[count] = _Share(
                {rank: queue(mine, self._bucket_bytes) for rank, mine in items.items()},
                {
                    rank: tuple(s for s, ranks in enumerate(receivers) if rank in ranks)
                    for rank in range(meeting.learners, meeting.world)
                },
            )
        return self._shares[count]

    def _open(self, meeting: Meeting, share: _Share) -> Calls:
        """Have the engines at the other end of the wire; on rank 0, the calls they are in.

        Raises CarryFailed on all ranks alike, without waiting for those who will not come.
        """
        joining = None if self._wire is not None else meeting.join(self._weights.rank)
        calls, refused = Calls(), Refusal()
        if self._team.is_root:
            try:
                post_all(meeting.engines, "/begin_weight_update", timeout_s=self._timeout_s)
                calls = meeting.call(self._invite, share.senders)
                refused = Refusal() if joining is None else refusal(joining, calls)
            except CarryFailed as error:
                refused = Refusal(failures=error.failures, summary=str(error))
        refused = self._team.told(refused, Refusal)
        if refused.summary:
            raise CarryFailed(refused.failures, refused.summary)
        if joining is not None:
            try:
                group = joining.result()
                dist.barrier(group)  # NCCL wants all ranks once, before operations of a few
            except RuntimeError as error:
                raise CarryFailed({}, f"no group with the engines: {reason(error)}") from error
            self._wire = Wire(group, wire_device(self._backend), meeting.name_of)
        return calls

    def _exchange(self, meeting: Meeting, share: _Share) -> tuple[int, Failures]:
        """Send what is this rank's to send; on rank 0, hear what engines say of it all."""
        assert self._wire is not None
        sent = send_all(
            self._wire,
            share.queues,
            self._outbox.read,
            rank=self._weights.rank,
            turns=Turns(meeting.learners, meeting.world),
        )
        return sent, self._reports(meeting, self._wire) if self._team.is_root else Failures()

    def _reports(self, meeting: Meeting, wire: Wire) -> Failures:
        ranks = range(meeting.learners, meeting.world)
        reports = torch.empty(len(ranks), REPORT_BYTES, dtype=torch.uint8, device=wire.device)
        pairs = list(zip(ranks, reports, strict=True))
        for posted in [wire.receive(report, rank, "the report") for rank, report in pairs]:
            posted.wait()
        faults = {rank: read_report(report) for rank, report in pairs}
        return {meeting.engine_of(rank).url: fault for rank, fault in faults.items() if fault}

    def _close(self, engines: tuple[EngineHandle, ...], version: int) -> None:
        post_all(engines, "/end_weight_update", timeout_s=self._timeout_s)
        body = {"new_version": str(version), "abort_all_requests": False}
        post_all(engines, "/update_weight_version", body, timeout_s=self._timeout_s)
