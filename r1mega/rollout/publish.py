"""Send a new version of the weights to every engine, and prove that it arrived.

Order, as SGLang 0.5.23 demands: join a group, /begin_weight_update, buckets broadcast tensor by
tensor with the version on the last, /end_weight_update; then checksums of a seeded choice of
tensors against what was sent. From the first byte until that proof an engine holds no version.

The tensors come from a stream that all learner ranks produce together, so a broken publish reads
the stream to its end before it raises ``SyncFailed``: a new one starts from scratch with the
engines that are left. Nothing of the old version needs to be kept.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from r1mega.parallel.collectives import broadcast_record
from r1mega.rollout import control
from r1mega.rollout.control import CallFailed
from r1mega.rollout.fleet import EngineHandle, Fleet, FleetNotReady
from r1mega.rollout.transfer import Failures, Transfer, TransferFailed
from r1mega.rollout.wire import digest

log = logging.getLogger(__name__)

_CHECK_ONE_IN = 8
_CHECK_AT_MOST_BYTES = 1 << 30  # a second or two of hashing, however large the model
_ATTEMPTS = 3

Bucket = list[tuple[str, Tensor]]


class SyncFailed(RuntimeError):
    """No engine is known to hold the new version; publishing again may succeed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncReport:
    """One successful publish. ``bytes`` counts the tensors once, not once per engine."""

    version: int
    bytes: int
    tensors: int
    checked: int  # tensors whose checksum was compared
    engines: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class _Outcome:
    """Of one attempt, as rank 0 tells it to the other ranks."""

    report: SyncReport | None = None
    failure: str = ""


@dataclass(kw_only=True, slots=True)
class _Sent:
    """What went out, for the report and the proof."""

    bytes: int = 0
    tensors: int = 0
    digests: dict[str, str] = field(default_factory=dict)
    digested_bytes: int = 0

    def note(self, bucket: Bucket, version: int) -> None:
        for name, tensor in bucket:
            self.tensors += 1
            self.bytes += tensor.nbytes
            if _is_checked(name, version) and self.digested_bytes < _CHECK_AT_MOST_BYTES:
                self.digests[name] = digest(tensor)
                self.digested_bytes += tensor.nbytes


def publish_from_all_ranks(
    fleet: Fleet | None,
    stream: Callable[[], Iterator[tuple[str, Tensor | None]]],
    version: int,
    bucket_bytes: int,
    *,
    engine_timeout_s: float,
    device: torch.device,
) -> SyncReport:
    """Publish from every rank of the learner; only rank 0 has the fleet and the whole tensors.

    All ranks return the same report or raise the same error. A broken publish is repeated with the
    engines that are left, or with one that comes back within ``engine_timeout_s``.
    """
    outcome = _Outcome()
    for _ in range(_ATTEMPTS):
        outcome = _attempt(fleet, stream(), version, bucket_bytes, engine_timeout_s)
        if (world := dist.group.WORLD) is not None:
            outcome = broadcast_record(outcome, _Outcome, source=0, group=world, device=device)
        if outcome.report is not None:
            return outcome.report
    raise SyncFailed(
        f"weights {version} reached no engine in {_ATTEMPTS} attempts: {outcome.failure}"
    )


def _attempt(
    fleet: Fleet | None,
    tensors: Iterator[tuple[str, Tensor | None]],
    version: int,
    bucket_bytes: int,
    engine_timeout_s: float,
) -> _Outcome:
    """The report, or why there is none."""
    try:
        if fleet is None:
            return _Outcome()
        fleet.wait_ready(1, engine_timeout_s)
        return _Outcome(report=publish(fleet, _present(tensors), version, bucket_bytes))
    except (FleetNotReady, SyncFailed) as error:
        log.warning("publishing version %d failed: %s", version, error)
        return _Outcome(failure=str(error))
    finally:
        _exhaust(tensors)


def publish(
    fleet: Fleet, tensors: Iterator[tuple[str, Tensor]], version: int, bucket_bytes: int
) -> SyncReport:
    """Send ``tensors`` to all usable engines and admit exactly those to the router."""
    started = time.monotonic()
    try:
        engines = fleet.usable()
        if not engines:
            raise SyncFailed("no engine answers")
        fleet.set_version(engines, None)
        sent = _send_all(fleet, engines, tensors, version, bucket_bytes)
        if fleet.compares_checksums:
            _compare_checksums(engines, sent.digests, fleet.timeout_s)
        fleet.set_version(engines, version)
        fleet.admit(version)
    except TransferFailed as error:
        culprits = _quarantine_culprits(fleet, engines, error.failures)
        raise SyncFailed("; ".join(culprits) or str(error)) from error
    except CallFailed as error:  # the router: the engines are blameless
        raise SyncFailed(str(error)) from error
    finally:
        _exhaust(tensors)
    return SyncReport(
        version=version,
        bytes=sent.bytes,
        tensors=sent.tensors,
        checked=len(sent.digests) if fleet.compares_checksums else 0,
        engines=tuple(engine.name for engine in engines),
        seconds=time.monotonic() - started,
    )


def _send_all(
    fleet: Fleet,
    engines: list[EngineHandle],
    tensors: Iterator[tuple[str, Tensor]],
    version: int,
    bucket_bytes: int,
) -> _Sent:
    sent = _Sent()
    group = fleet.join(engines)
    _post_all(fleet, group, "/begin_weight_update")
    for bucket, is_last in _with_last_marked(_buckets(tensors, bucket_bytes)):
        group.send(bucket, version=version if is_last else None)
        sent.note(bucket, version)
    _post_all(fleet, group, "/end_weight_update")
    return sent


def _post_all(fleet: Fleet, group: Transfer, route: str) -> None:
    if failures := control.post_each(group.urls, route, {}, timeout_s=fleet.timeout_s):
        raise TransferFailed(failures)


def _compare_checksums(
    engines: list[EngineHandle], digests: dict[str, str], timeout_s: float
) -> None:
    found = {engine.url: _difference(engine, digests, timeout_s) for engine in engines}
    if wrong := {url: why for url, why in found.items() if why is not None}:
        raise TransferFailed(wrong)


def _difference(engine: EngineHandle, digests: dict[str, str], timeout_s: float) -> str | None:
    """What is wrong with the weights that ``engine`` holds."""
    url = f"{engine.url}/weights_checker"
    try:
        answer = control.post(url, {"action": "checksum"}, timeout_s=timeout_s)
    except CallFailed as error:
        return str(error)
    held = answer["ranks"][0]["checksums"]
    bad = [name for name, sent in digests.items() if held.get(name) != sent]
    if not bad:
        return None
    return (
        f"it holds other values than were sent in {len(bad)} of {len(digests)} tensors compared, "
        f"the first is {bad[0]}"
    )


def _quarantine_culprits(
    fleet: Fleet, engines: list[EngineHandle], failures: Failures
) -> list[str]:
    """Whose fault it was. A dead engine breaks the group of all: others only if nobody is dead."""
    fleet.leave()
    alive = fleet.healthy(engines)
    if len(alive) < len(engines):
        guilty = {engine: "does not answer" for engine in engines if engine not in alive}
    else:
        guilty = {engine: failures[engine.url] for engine in engines if engine.url in failures}
    for engine in engines:
        if engine in guilty:
            fleet.quarantine(engine, guilty[engine])
        else:
            _close_session(fleet, engine)
    return [f"{engine.name}: {reason}" for engine, reason in guilty.items()]


def _close_session(fleet: Fleet, engine: EngineHandle) -> None:
    """Leave the engine ready for the next /begin_weight_update."""
    try:
        control.post(f"{engine.url}/end_weight_update", {}, timeout_s=fleet.timeout_s)
    except CallFailed as error:
        log.info("%s had no update to close: %s", engine.name, error)


def _is_checked(name: str, version: int) -> bool:
    """Other tensors for each version, so that in time all of them are checked."""
    return hashlib.sha256(f"{version}/{name}".encode()).digest()[0] % _CHECK_ONE_IN == 0


def _buckets(tensors: Iterable[tuple[str, Tensor]], bucket_bytes: int) -> Iterator[Bucket]:
    """Consecutive tensors of at most ``bucket_bytes`` together; a larger tensor goes alone."""
    bucket: Bucket = []
    size = 0
    for name, tensor in tensors:
        if bucket and size + tensor.nbytes > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket


def _with_last_marked(buckets: Iterator[Bucket]) -> Iterator[tuple[Bucket, bool]]:
    held = next(buckets, None)
    for bucket in buckets:
        assert held is not None
        yield held, False
        held = bucket
    if held is not None:
        yield held, True


def _present(tensors: Iterator[tuple[str, Tensor | None]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        if tensor is None:
            raise ValueError(f"rank 0 publishes, but it has no tensor for {name}")
        yield name, tensor


def _exhaust(tensors: Iterator[object]) -> None:
    """The other ranks of the learner are in the same stream."""
    for _ in tensors:
        pass
