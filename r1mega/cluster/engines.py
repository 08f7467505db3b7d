"""Keep the engines of one machine alive: start, register when they answer, restart when they end.

An engine that ends comes back on a new port with the next incarnation, so nobody takes it for the
one that held weights. Invariant: an engine's file exists exactly while it was last seen alive after
answering /health.
"""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from r1mega.cluster.errors import JobFailed
from r1mega.rollout import control
from r1mega.rollout.fleet import EngineHandle, engine_file, write_engine
from r1mega.system import processes
from r1mega.system.processes import Process

log = logging.getLogger(__name__)

StartEngine = Callable[[int, int], Process]  # (index, port) -> process
_HEALTH_TIMEOUT_S = 20.0


@dataclass(kw_only=True, slots=True)
class _Slot:
    """The place of one engine, over its lives."""

    index: int
    process: Process
    url: str
    started: float
    incarnation: int = 0
    answered: bool = False
    probe: "Future[bool] | None" = None


class Engines:
    """``tick()`` regularly from the thread that made this object."""

    def __init__(
        self,
        start: StartEngine,
        *,
        count: int,
        host: str,
        folder: Path,
        start_timeout_s: float,
        max_restarts: int,
    ) -> None:
        self._start = start
        self._host = host
        self._folder = folder
        self._start_timeout_s = start_timeout_s
        self._max_restarts = max_restarts
        self._probes = ThreadPoolExecutor(max_workers=max(1, count))
        self._slots = [self._new_slot(index, 0) for index in range(count)]

    def processes(self) -> list[Process]:
        return [slot.process for slot in self._slots]

    def close(self) -> None:
        """Stop probing; the processes are the caller's to end."""
        self._probes.shutdown(wait=False, cancel_futures=True)

    def tick(self) -> None:
        """Restart what ended, register what answers; ``JobFailed`` when one cannot be had."""
        for index, slot in enumerate(self._slots):
            if not slot.process.alive():
                self._slots[index] = self._restart(slot)
            elif not slot.answered:
                self._register_if_answering(slot)

    def _new_slot(self, index: int, incarnation: int) -> _Slot:
        port = processes.free_port(self._host)
        return _Slot(
            index=index,
            process=self._start(index, port),
            url=f"http://{self._host}:{port}",
            started=time.monotonic(),
            incarnation=incarnation,
        )

    def _restart(self, slot: _Slot) -> _Slot:
        engine_file(self._folder, slot.process.name).unlink(missing_ok=True)
        name, code = slot.process.name, slot.process.exit_code()
        if slot.incarnation >= self._max_restarts:
            restarts = (
                f" after {slot.incarnation} restarts (rollout.max_restarts={self._max_restarts})"
            )
            raise JobFailed(processes.obituary(name, code, slot.process.log, note=restarts))
        log.warning("%s %s; starting it again", name, processes.how_it_ended(code))
        return self._new_slot(slot.index, slot.incarnation + 1)

    def _register_if_answering(self, slot: _Slot) -> None:
        if slot.probe is None:
            url = f"{slot.url}/health"
            slot.probe = self._probes.submit(control.answers, url, timeout_s=_HEALTH_TIMEOUT_S)
        if slot.probe.done():
            slot.answered = slot.probe.result()
            slot.probe = None
        if slot.answered:
            self._register(slot)
        elif time.monotonic() - slot.started > self._start_timeout_s:
            raise JobFailed(
                f"{slot.process.name} at {slot.url} did not answer within "
                f"{self._start_timeout_s:.0f} s (rollout.engine_start_timeout_s): "
                f"{processes.last_words(slot.process.log)}"
            )

    def _register(self, slot: _Slot) -> None:
        seconds = time.monotonic() - slot.started
        log.info("%s answers at %s after %.1f s", slot.process.name, slot.url, seconds)
        engine = EngineHandle(
            name=slot.process.name,
            url=slot.url,
            pid=slot.process.pid,
            incarnation=slot.incarnation,
        )
        write_engine(self._folder, engine)
