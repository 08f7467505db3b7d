"""What is done of a long piece of work, so that it goes on after a kill.

One line of JSON for the work and one for every item done. A line counts once its newline is there:
a kill tears the last one at worst. The process that works holds a lock on the file.
"""

import fcntl
import json
import os
from pathlib import Path
from threading import Lock
from typing import Any, Self


class Journal:
    """Use as a context manager: it keeps the file open and locked. ``record`` takes any thread.

    Raises ValueError when another process holds it, OSError when it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._lock = Lock()
        self._file = path.open("ab+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ValueError(f"another process is at work in {path.parent}: wait for it") from None
        except OSError:  # a file system without locks, as Lustre without -o flock
            pass
        self._lines = self._read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def work(self) -> str | None:
        """The work that was begun; None: no work was."""
        return self._lines[0] if self._lines else None

    @property
    def done(self) -> dict[str, Any]:
        """The result of every item that is done."""
        return dict(self._lines[1:])

    def forget(self) -> None:
        self._file.truncate(0)
        self._lines = []

    def begin(self, work: str) -> None:
        """The first line; behind ``forget`` or on a new file."""
        self._append(work)

    def record(self, item: str, result: Any) -> None:
        """``item`` is done; ``result`` goes through JSON."""
        self._append([item, result])

    def _append(self, value: Any) -> None:
        with self._lock:
            self._file.write(json.dumps(value).encode() + b"\n")
            self._file.flush()
            self._lines.append(value)

    def _read(self) -> list[Any]:
        self._file.seek(0)
        lines, _, torn = self._file.read().rpartition(b"\n")
        if torn:
            self._file.seek(-len(torn), os.SEEK_END)
            self._file.truncate()
        try:
            return [json.loads(line) for line in lines.splitlines()]
        except ValueError:  # not written by us: as good as none
            return []
