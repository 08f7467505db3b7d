"""Give every engine a new version of the weights, and admit only those that prove to hold it.

A carrier (broadcast, p2p, disk) moves the weights; ``proof`` looks at what arrived. From the first
byte until that proof an engine holds no version, and nobody draws samples. Then the router forwards
to the engines that passed and to no other, so nothing is trained on what another one says; one that
failed for a reason of its own is in quarantine until it is restarted.

All ranks of the learner publish together: rank 0 has the fleet and tells the others. A broken
transfer is repeated from scratch with the engines that are left; nothing of the old version needs
to be kept.
"""

import logging
import time
from dataclasses import dataclass, field

from r1mega.parallel.collectives import Team
from r1mega.rollout import control
from r1mega.rollout.carrier import Carried, Carrier, CarryFailed, Failures
from r1mega.rollout.control import CallFailed
from r1mega.rollout.fleet import EngineHandle, Fleet, FleetNotReady
from r1mega.rollout.proof import Proof, Verdict

log = logging.getLogger(__name__)

_ATTEMPTS = 3
_CLOSE_TIMEOUT_S = 60.0


class SyncFailed(RuntimeError):
    """No engine is known to hold the new version; publishing again may succeed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncReport:
    """One successful publish."""

    version: int
    engines: tuple[str, ...]  # that hold it
    bytes: int  # that arrived at engines, over all their ranks
    minimum_bytes: int  # that had to arrive
    point_to_point_bytes: int  # of those, sent to nobody else
    verified: int  # parameters whose checksums were compared, over all engines
    probe_difference: float  # of log-probs, the largest of any engine
    probe_seconds: float
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class _Chosen:
    """The engines to give weights to, or why there are none."""

    engines: tuple[EngineHandle, ...] = ()
    failure: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Passage:
    """How carrying went on one rank of the learner."""

    carried: Carried = field(default_factory=Carried)
    failures: Failures | None = None  # None: it did not fail
    summary: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Outcome:
    """Of one attempt, as rank 0 tells it to the other ranks."""

    report: SyncReport | None = None
    failure: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Publisher:
    """Every rank of the learner, the ``team``, has one and calls it alike."""

    fleet: Fleet | None  # on rank 0
    carrier: Carrier
    proof: Proof
    team: Team
    engine_bytes: int  # that the ranks of one engine have to receive at least
    engine_timeout_s: float

    def publish(self, version: int) -> SyncReport:
        """The same report on every rank, or the same SyncFailed.

        A broken attempt is repeated with the engines that are left, or with one that comes back
        within ``engine_timeout_s``.
        """
        outcome = _Outcome()
        for _ in range(_ATTEMPTS):
            outcome = self._attempt(version)
            if outcome.report is not None:
                return outcome.report
            if self.fleet is not None:
                log.warning("publishing version %d failed: %s", version, outcome.failure)
        raise SyncFailed(
            f"weights {version} reached no engine in {_ATTEMPTS} attempts: {outcome.failure}"
        )

    def close(self) -> None:
        """Leave the engines to themselves."""
        self.carrier.abandon()

    def _attempt(self, version: int) -> _Outcome:
        started = time.monotonic()
        chosen = self.team.told(self._choose() if self.fleet else _Chosen(), _Chosen)
        if not chosen.engines:
            return _Outcome(failure=chosen.failure)
        passages = self.team.gathered(self._carry(chosen.engines, version), _Passage)
        if any(passage.failures is not None for passage in passages):
            self.carrier.abandon()
            return self.team.told(self._blamed(chosen.engines, passages), _Outcome)
        verdict = self.proof.check(chosen.engines, version)
        return self.team.told(
            self._concluded(chosen.engines, passages, verdict, version, started), _Outcome
        )

    def _choose(self) -> _Chosen:
        """From here on they hold no version; on rank 0."""
        assert self.fleet is not None
        try:
            engines = self.fleet.wait_ready(1, self.engine_timeout_s)
        except FleetNotReady as error:
            return _Chosen(failure=str(error))
        self.fleet.set_version(engines, None)
        return _Chosen(engines=tuple(engines))

    def _carry(self, engines: tuple[EngineHandle, ...], version: int) -> _Passage:
        try:
            return _Passage(carried=self.carrier.carry(engines, version))
        except CarryFailed as error:
            return _Passage(failures=error.failures, summary=str(error))

    def _concluded(
        self,
        engines: tuple[EngineHandle, ...],
        passages: list[_Passage],
        verdict: Verdict,
        version: int,
        started: float,
    ) -> _Outcome:
        """The router forwards to those that passed; on rank 0."""
        if self.fleet is None:
            return _Outcome()
        if failure := _admit(self.fleet, engines, verdict, version):
            return _Outcome(failure=failure)
        report = SyncReport(
            version=version,
            engines=tuple(e.name for e in engines if e.url not in verdict.failures),
            bytes=sum(passage.carried.bytes for passage in passages),
            minimum_bytes=self.engine_bytes * len(engines),
            point_to_point_bytes=sum(p.carried.point_to_point_bytes for p in passages),
            verified=verdict.verified,
            probe_difference=verdict.probe_difference,
            probe_seconds=verdict.probe_seconds,
            seconds=time.monotonic() - started,
        )
        return _Outcome(report=report)

    def _blamed(self, engines: tuple[EngineHandle, ...], passages: list[_Passage]) -> _Outcome:
        """Whose fault it was, into quarantine; on rank 0."""
        if self.fleet is None:
            return _Outcome()
        failed = [passage for passage in passages if passage.failures is not None]
        failures = {url: why for passage in failed for url, why in (passage.failures or {}).items()}
        blamed = _quarantine_culprits(self.fleet, engines, failures)
        return _Outcome(failure="; ".join(blamed) or failed[0].summary)


def _admit(fleet: Fleet, engines: tuple[EngineHandle, ...], verdict: Verdict, version: int) -> str:
    """Have the router forward to exactly those that passed; why that cannot be, or nothing."""
    sound = [engine for engine in engines if engine.url not in verdict.failures]
    for engine in engines:
        if engine not in sound:
            fleet.quarantine(engine, verdict.failures[engine.url])
    fleet.set_version(sound, version)
    try:
        fleet.admit(version)
    except CallFailed as error:  # the router: the engines are blameless
        return str(error)
    if sound:
        return ""
    return "; ".join(f"{engine.name}: {verdict.failures[engine.url]}" for engine in engines)


def _quarantine_culprits(
    fleet: Fleet, engines: tuple[EngineHandle, ...], failures: Failures
) -> list[str]:
    """Whose fault it was. A dead engine breaks the group of all: others only if nobody is dead."""
    alive = fleet.healthy(engines)
    if len(alive) < len(engines):
        guilty = {engine: "does not answer" for engine in engines if engine not in alive}
    else:
        guilty = {engine: failures[engine.url] for engine in engines if engine.url in failures}
    for engine, reason in guilty.items():
        fleet.quarantine(engine, reason)
    # The others may have an update open, which would refuse the next /begin_weight_update. At once:
    # the other ranks of the learner wait for us.
    others = [engine.url for engine in engines if engine not in guilty]
    idle = control.post_each(others, "/end_weight_update", {}, timeout_s=_CLOSE_TIMEOUT_S)
    for sentence in idle.values():
        log.info("no update to close: %s", sentence)
    return [f"{engine.name}: {reason}" for engine, reason in guilty.items()]
