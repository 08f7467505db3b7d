"""Seconds per named phase of a step, for metrics."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """``with watch.phase("time/sync_s"): ...`` adds up until ``lap`` hands out and clears."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

    def lap(self) -> dict[str, float]:
        seconds, self._seconds = self._seconds, {}
        return seconds
