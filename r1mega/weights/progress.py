"""Telling a user how far work on many bytes has come."""

from collections.abc import Callable
from threading import Lock
from typing import Protocol

Advance = Callable[[int], None]  # told of bytes that were done just now; by several threads


class Listener(Protocol):
    """Whoever wants to know how it goes; called by several threads."""

    def note(self, sentence: str) -> None: ...

    def progress(self, what: str, done: int, total: int) -> None:
        """``what`` ("copied", "verified") happened to ``done`` of ``total`` bytes."""


class Meter:
    """Counts the bytes that threads report."""

    def __init__(self, what: str, total: int, listener: Listener) -> None:
        self._what, self._total, self._listener = what, total, listener
        self._done = 0
        self._lock = Lock()

    def advance(self, num_bytes: int) -> None:
        with self._lock:
            self._done += num_bytes
            self._listener.progress(self._what, self._done, self._total)
