"""Append-only JSON lines keyed by ``step``: the form of metrics.jsonl and samples.jsonl.

Invariants: steps never fall, so forgetting the steps after some step is cutting the file off; a row
is appended whole or, when the process dies in the middle, left without its newline: such a tail is
no row to any reader and is cut off before the next append. Numbers that are not finite are written
as null, because NaN is not JSON and a run that diverges must still tell its story.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from r1mega.system.files import write_atomically

_BLOCK = 1 << 16


def iterate_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Every complete row, in order; nothing when there is no file yet."""
    return (row for _, row in _rows_at(path))


def append_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append ``rows`` and hand them to the operating system, after a whole last row."""
    text = "".join(json.dumps(_finite(row), allow_nan=False) + "\n" for row in rows)
    try:
        with path.open("ab+") as file:
            _cut_half_row(file.fileno())
            file.write(text.encode())
    except OSError as error:  # a full disk does not name the file
        raise OSError(error.errno, error.strerror, str(path)) from error


def replace_last_row(path: Path, row: dict[str, Any]) -> None:
    """Put ``row`` in the place of the last one; readers see the one or the other."""
    *_, (offset, _) = _rows_at(path)
    line = json.dumps(_finite(row), allow_nan=False) + "\n"
    write_atomically(path, path.read_bytes()[:offset] + line.encode())


def truncate_after(path: Path, step: int) -> None:
    """Drop the rows of later steps: what follows is done again."""
    if not path.exists():
        return
    end = next((offset for offset, row in _rows_at(path) if row["step"] > step), None)
    with path.open("rb+") as file:
        if end is not None:
            file.truncate(end)
        _cut_half_row(file.fileno())
        os.fsync(file.fileno())


def _rows_at(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(byte offset, row) of every complete row."""
    if not path.exists():
        return
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n"):
                yield offset, _parse(path, number, line)
            offset += len(line)


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}:{number}: expected a JSON object, got {line[:80]!r}") from error
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise ValueError(f"{path}:{number}: expected an object with a step, got {line[:80]!r}")
    return row


def _cut_half_row(descriptor: int) -> None:
    """Cut off what a dying process left of its last row, reading from the end of the file."""
    end = os.fstat(descriptor).st_size
    keep = end
    while keep > 0:
        begin = max(0, keep - _BLOCK)
        newline = os.pread(descriptor, keep - begin, begin).rfind(b"\n")
        keep = begin + newline + 1 if newline >= 0 else begin
        if newline >= 0:
            break
    if keep < end:
        os.ftruncate(descriptor, keep)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value
