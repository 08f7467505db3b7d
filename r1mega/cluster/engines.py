"""Keep the engines of one machine alive: start, register when they answer, restart when they end.

An engine that ends, or that we end because it fell silent, comes back on a new port with the next
incarnation, so nobody takes it for the one that held weights. Invariant: an engine's file exists
exactly while it was last seen alive after answering /health.
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
_PROBES_PER_SILENCE = 5
_FROZEN_GRACE_S = 1.0


@dataclass(kw_only=True, slots=True)
class _Slot:
    """The place of one engine, over its lives."""

    index: int
    process: Process
    url: str
    started: float
    heard: float  # its last sign of life
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
        silence_timeout_s: float,
        max_restarts: int,
    ) -> None:
        self._start = start
        self._host = host
        self._folder = folder
        self._start_timeout_s = start_timeout_s
        self._silence_timeout_s = silence_timeout_s
        self._max_restarts = max_restarts
        self._probes = ThreadPoolExecutor(max_workers=max(1, count))
        self._slots = [self._new_slot(index, 0) for index in range(count)]

    def processes(self) -> list[Process]:
        return [slot.process for slot in self._slots]

    def close(self) -> None:
        """Stop probing; the processes are the caller's to end."""
        self._probes.shutdown(wait=False, cancel_futures=True)

    def tick(self) -> None:
        """Restart what ended, register what answers, end what fell silent.

        ``JobFailed`` when an engine cannot be had.
        """
        for index, slot in enumerate(self._slots):
            if not slot.process.alive():
                self._slots[index] = self._restart(slot)
            else:
                self._listen(slot)

    def _new_slot(self, index: int, incarnation: int) -> _Slot:
        port = processes.free_port(self._host)
        process, now = self._start(index, port), time.monotonic()
        url = f"http://{self._host}:{port}"
        return _Slot(
            index=index, process=process, url=url, started=now, heard=now, incarnation=incarnation
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

    def _listen(self, slot: _Slot) -> None:
        """Ask for signs of life: often until the first, then now and then."""
        if slot.probe is None and self._silence(slot) >= self._pause(slot):
            url = f"{slot.url}/health"
            slot.probe = self._probes.submit(control.answers, url, timeout_s=_HEALTH_TIMEOUT_S)
        if slot.probe is not None and slot.probe.done():
            if slot.probe.result():
                self._note_answer(slot)
            slot.probe = None
        if not slot.answered and self._silence(slot) > self._start_timeout_s:
            raise JobFailed(
                f"{slot.process.name} at {slot.url} did not answer within "
                f"{self._start_timeout_s:.0f} s (rollout.engine_start_timeout_s): "
                + processes.last_words(slot.process.log)
            )
        if slot.answered and self._silence(slot) > self._silence_timeout_s:
            log.warning(
                "%s has not answered for %.0f s (rollout.engine_silence_timeout_s); ending it",
                slot.process.name,
                self._silence(slot),
            )
            processes.end([slot.process], grace_s=_FROZEN_GRACE_S)

    def _silence(self, slot: _Slot) -> float:
        return time.monotonic() - slot.heard

    def _pause(self, slot: _Slot) -> float:
        return self._silence_timeout_s / _PROBES_PER_SILENCE if slot.answered else 0.0

    def _note_answer(self, slot: _Slot) -> None:
        slot.heard = time.monotonic()
        if not slot.answered:
            slot.answered = True
            self._register(slot)

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
