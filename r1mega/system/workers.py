"""Killable worker processes for work that may hang, crash or eat the machine.

Invariants: every item gets exactly one Result, in order, within a bounded time; an item that
overruns its CPU seconds or memory costs its worker its life and nobody else anything; messages are
JSON lines over pipes, never pickles; a worker starts in the background, imports no torch and never
outlives its parent for longer than one item. CPU time is charged, not wall time, so a loaded
machine changes no result; the wall limit only catches a worker that waits for something that never
comes, which is the machinery's fault.
"""

import contextlib
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

_SCRIPT = Path(__file__).with_name("worker_main.py")
# No more of the environment, credentials least of all, reaches a process that reads model text.
_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR")
_BACKSTOP_S = 5.0  # past the worker's own wall clock: for a process that was stopped
_MAX_FAILED_STARTS = 3  # in a row, over the whole pool
_MAX_ATTEMPTS = 2  # of one item over worker crashes


@dataclass(frozen=True, slots=True)
class Result:
    """``value``: what the work returned. ``overrun``: the item exceeded a limit (``detail`` says
    which). ``error``: the machinery failed (``detail`` says how), twice."""

    outcome: Literal["value", "overrun", "error"]
    value: Any = None
    detail: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one item may use, and for how many items a worker lives."""

    cpu_seconds: float
    wall_seconds: float = 300.0
    memory_bytes: int = 2 << 30
    item_bytes: int = 32 << 10  # below a pipe's capacity: handing over an item never blocks
    items_per_worker: int = 2000


class WorkerPool:
    """``WorkerPool(setup, num_workers=2, limits=Limits(cpu_seconds=10)).map(items)``.

    ``setup`` is a module-level function without arguments. Each worker calls it once, before its
    first item and off the clock, and applies what it returns to every item; items and values are
    anything JSON can hold.
    """

    def __init__(
        self,
        setup: Callable[[], Callable[[Any], Any]],
        *,
        num_workers: int,
        limits: Limits,
    ) -> None:
        if num_workers < 1:
            raise ValueError(f"num_workers={num_workers}: a pool needs at least one worker")
        if setup.__module__ == "__main__" or "." in setup.__qualname__:
            raise ValueError(
                f"{setup.__module__}.{setup.__qualname__} cannot be found by another process: "
                "pass a function defined at the top of an importable module"
            )
        self._limits = limits
        self._setup = setup
        self._lock = threading.Lock()
        self._failed_starts = 0
        self._workers = [_Worker(setup, self._limits) for _ in range(num_workers)]

    def map(self, items: Iterable[Any]) -> list[Result]:
        """One Result per item, in order. Threads may share a pool; their calls take turns."""
        with self._lock:
            if not self._workers:
                raise RuntimeError("this WorkerPool is closed")
            lines = [json.dumps(item).encode() + b"\n" for item in items]
            results: dict[int, Result] = {}
            for index, line in enumerate(lines):
                if len(line) > self._limits.item_bytes:
                    detail = f"input of {len(line)} bytes (limit {self._limits.item_bytes})"
                    results[index] = Result("overrun", detail=detail)
            waiting = deque(index for index in range(len(lines)) if index not in results)
            self._work_off(lines, waiting, results)
            return [results[index] for index in range(len(lines))]

    def close(self) -> None:
        """End every worker. Calling it twice does nothing."""
        with self._lock:
            workers, self._workers = self._workers, []
            for worker in workers:
                worker.kill()

    def _work_off(
        self, lines: list[bytes], waiting: deque[int], results: dict[int, Result]
    ) -> None:
        busy: dict[_Worker, int] = {}
        attempts = dict.fromkeys(waiting, 0)
        try:
            while len(results) < len(lines):
                for worker in self._workers:
                    if waiting and worker.ready and worker not in busy:
                        index = busy[worker] = waiting.popleft()
                        attempts[index] += 1
                        worker.hand_over(lines[index])
                for worker, result in _next_results(self._workers):
                    if result.outcome != "value" or worker.items >= self._limits.items_per_worker:
                        self._replace(worker)
                    if worker not in busy:
                        continue  # it died idle, or while starting
                    index = busy.pop(worker)
                    if result.outcome == "error" and attempts[index] < _MAX_ATTEMPTS:
                        waiting.append(index)
                    else:
                        results[index] = result
        finally:
            for worker in busy:  # left by an exception: nobody is there to take its answer
                self._replace(worker)

    def _replace(self, worker: "_Worker") -> None:
        worker.kill()
        self._workers[self._workers.index(worker)] = _Worker(self._setup, self._limits)
        self._failed_starts = 0 if worker.ready else self._failed_starts + 1
        if self._failed_starts >= _MAX_FAILED_STARTS:
            raise RuntimeError(
                f"workers of {self._setup.__module__}.{self._setup.__qualname__} failed to start "
                f"{self._failed_starts} times in a row, last with: {worker.last_words}"
            )


class _Worker:
    """One process; not ready until its setup function has returned."""

    def __init__(self, setup: Callable[[], Callable[[Any], Any]], limits: Limits) -> None:
        self.ready = False
        self.items = 0
        self.last_words = ""
        self.deadline = math.inf
        self._limits = limits
        self._buffer = b""
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            # -P: the script's folder must not shadow modules of the same names
            [sys.executable, "-P", str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for the parent, which ends its workers itself
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
            | {"OMP_NUM_THREADS": "1"},
        )
        start = {
            "path": [os.path.abspath(entry) for entry in sys.path],
            "module": setup.__module__,
            "function": setup.__qualname__,
            "cpu_seconds": limits.cpu_seconds,
            "wall_seconds": limits.wall_seconds,
            "memory_bytes": limits.memory_bytes,
        }
        self.hand_over(json.dumps(start).encode() + b"\n")

    def fileno(self) -> int:
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def hand_over(self, line: bytes) -> None:
        assert self._process.stdin is not None
        self.deadline = time.monotonic() + self._limits.wall_seconds + _BACKSTOP_S
        with contextlib.suppress(BrokenPipeError):  # it died idle: the next receive() says so
            self._process.stdin.write(line)

    def receive(self) -> Result | None:
        """What a readable worker says; None when that is only that it is ready, or half a line."""
        chunk = os.read(self.fileno(), 1 << 16)
        if not chunk:
            return self._obituary()
        self._buffer += chunk
        if not self._buffer.endswith(b"\n"):
            return None
        message, self._buffer = json.loads(self._buffer), b""
        self.deadline = math.inf
        if not self.ready:
            self.ready = True
            return None
        self.items += 1
        if "overrun" in message:
            limit_mib = self._limits.memory_bytes >> 20
            return Result("overrun", detail=f"{message['overrun']} (limit {limit_mib} MiB)")
        return Result("value", message["value"])

    def give_up(self) -> Result:
        """Kill a worker that outstayed even the clock it runs under (it was stopped, say)."""
        self.kill()
        return Result("error", detail=f"no sign of life in {self._limits.wall_seconds:g} s")

    def kill(self) -> None:
        """End the process and reap it; harmless when it is already gone."""
        if self._stderr.closed:
            return
        self._process.kill()
        self._process.wait()
        self.last_words = _last_line(self._stderr)
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            if stream is not None:
                stream.close()

    def _obituary(self) -> Result:
        code = self._process.wait()
        self.kill()
        if code == -signal.SIGPROF:
            return Result("overrun", detail=f"{self._limits.cpu_seconds:g} CPU seconds")
        if code == -signal.SIGALRM:
            return Result("error", detail=f"no answer in {self._limits.wall_seconds:g} s")
        cause = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return Result("error", detail=f"worker ended with {cause}: {self.last_words}")


def _next_results(workers: list[_Worker]) -> list[tuple[_Worker, Result]]:
    """Wait until a worker can be read or is overdue; what the readable ones have to say."""
    first = min(workers, key=lambda worker: worker.deadline)
    timeout = None if first.deadline == math.inf else max(0.0, first.deadline - time.monotonic())
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            selector.register(worker, selectors.EVENT_READ, worker)
        readable = [key.data for key, _ in selector.select(timeout)]
    if not readable:
        return [(first, first.give_up())]
    said = [(worker, worker.receive()) for worker in readable]
    return [(worker, result) for worker, result in said if result is not None]


def _last_line(stderr: IO[bytes]) -> str:
    stderr.seek(0, os.SEEK_END)
    stderr.seek(max(0, stderr.tell() - 4096))
    lines = stderr.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "no message")
