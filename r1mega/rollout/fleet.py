"""The engines of a run as rank 0 of the learner sees them, and who of them may answer.

The launcher writes one file per live engine; an engine restarted has a new incarnation and thus
none of our weights. Invariant: the router forwards to exactly the engines that hold the version
last admitted. An engine whose weights are half written or that failed a publish holds no version;
one that failed a publish for a reason of its own stays out until it is restarted.
"""

import json
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from r1mega.rollout import control
from r1mega.rollout.router import RouterClient
from r1mega.system import files, processes

log = logging.getLogger(__name__)

_HEALTH_TIMEOUT_S = 20.0  # SGLang generates a token behind a sleep of one second


class FleetNotReady(RuntimeError):
    """One sentence: which engines did not come up, and the end of their logs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineHandle:
    """One life of one engine: equal handles hold the same weights."""

    name: str  # engine-0
    url: str
    pid: int
    incarnation: int


class Fleet:
    """Discovers engines in ``folder``; remembers who holds which version; steers the router."""

    def __init__(
        self,
        folder: Path,
        router: RouterClient,
        *,
        logs: Path,
    ) -> None:
        self._folder = folder
        self._router = router
        self._logs = logs
        self._versions: dict[EngineHandle, int] = {}
        self._quarantined: dict[EngineHandle, str] = {}  # and why

    def engines(self) -> list[EngineHandle]:
        """The engines that the launcher says are alive."""
        found = map(_read_if_alive, sorted(self._folder.glob("engine-*.json")))
        return [engine for engine in found if engine is not None]

    def usable(self) -> list[EngineHandle]:
        """Those that answer /health and are not in quarantine."""
        candidates = [engine for engine in self.engines() if engine not in self._quarantined]
        healthy = self.healthy(candidates)
        return [engine for engine in candidates if engine in healthy]

    def healthy(self, engines: Sequence[EngineHandle]) -> set[EngineHandle]:
        """Which of ``engines`` answer /health."""
        with ThreadPoolExecutor(max(1, len(engines))) as pool:
            replies = pool.map(
                lambda engine: control.answers(f"{engine.url}/health", timeout_s=_HEALTH_TIMEOUT_S),
                engines,
            )
        return {engine for engine, answered in zip(engines, replies, strict=True) if answered}

    def wait_ready(self, count: int, timeout_s: float) -> list[EngineHandle]:
        """Wait until ``count`` engines are usable; an engine in quarantine will not be."""
        deadline = time.monotonic() + timeout_s
        while len(usable := self.usable()) < count:
            present = self.engines()
            if len(present) == len(self._expected()) and not set(present) - set(self._quarantined):
                raise FleetNotReady(f"every engine is in quarantine: {self._reasons(present)}")
            if time.monotonic() > deadline:
                raise FleetNotReady(self._who_is_missing(usable, count, timeout_s))
            time.sleep(0.2)
        return usable

    def _who_is_missing(self, usable: list[EngineHandle], count: int, timeout_s: float) -> str:
        present = {engine.name for engine in usable}
        missing = sorted(self._expected() - present)
        ends = [f"{name}: {processes.last_lines(self._log(name), 5)}" for name in missing]
        return (
            f"{len(present)} of {count} engines answered within {timeout_s:.0f} s; "
            f"missing: {', '.join(missing) or 'never started'}; logs are in {self._logs}\n"
            + "\n".join(ends)
        )

    def _expected(self) -> set[str]:
        """The engines that were ever started."""
        return {path.stem for path in self._logs.glob("engine-*.log")}

    def _reasons(self, engines: Sequence[EngineHandle]) -> str:
        return "; ".join(f"{engine.name}: {self._quarantined[engine]}" for engine in engines)

    def _log(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def set_version(self, engines: Sequence[EngineHandle], version: int | None) -> None:
        """``engines`` hold ``version``, or no version at all while weights are on the way."""
        for engine in engines:
            if version is None:
                self._versions.pop(engine, None)
            else:
                self._versions[engine] = version

    def holding(self, version: int) -> list[EngineHandle]:
        """The live engines that hold ``version``."""
        return [engine for engine in self.engines() if self._versions.get(engine) == version]

    def admit(self, version: int) -> list[EngineHandle]:
        """Have the router forward to exactly the engines that hold ``version``."""
        admitted = self.holding(version)
        self._router.forward_exactly_to({engine.url for engine in admitted})
        return admitted

    def quarantine(self, engine: EngineHandle, reason: str) -> None:
        """Use ``engine`` no more in this life."""
        log.warning("%s (%s) is out until it is restarted: %s", engine.name, engine.url, reason)
        self._quarantined[engine] = reason
        self._versions.pop(engine, None)


def write_engine(folder: Path, engine: EngineHandle) -> None:
    """Tell the fleet that ``engine`` is alive."""
    files.write_atomically(engine_file(folder, engine.name), json.dumps(asdict(engine)) + "\n")


def read_engine(path: Path) -> EngineHandle:
    return EngineHandle(**json.loads(path.read_text()))


def _read_if_alive(path: Path) -> EngineHandle | None:
    """The launcher takes the file away when the engine ends, also after we have listed it."""
    try:
        return read_engine(path)
    except FileNotFoundError:
        return None


def engine_file(folder: Path, name: str) -> Path:
    """There exactly while the engine is alive."""
    return folder / f"{name}.json"
