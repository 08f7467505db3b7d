"""Files that are never seen half written, and JSON lines whose errors name their place.

Invariant: after ``write_atomically`` returns, the path holds the new content on disk; at any moment
before, and after a crash at any point, it holds the old content or nothing.
"""

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def write_atomically(path: Path, data: bytes | str) -> None:
    """Replace ``path`` by ``data``; readers see the old file or the new one, also after a crash."""
    content = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """``write_atomically`` each of ``contents`` to its path relative to ``folder``."""
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_atomically(folder / name, content)


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) for every non-blank line of ``path``."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _parse_object(path, number, line)


def _parse_object(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{number}: expected UTF-8 text, got {error.reason}") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}:{number}: expected one JSON object per line, "
            f"got {_excerpt(line)} ({error.msg}, column {error.colno})"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(
            f"{path}:{number}: expected one JSON object per line, got {_excerpt(line)}"
        )
    return value


def _excerpt(line: bytes, length: int = 60) -> str:
    text = line.decode("utf-8", errors="replace").strip()
    return repr(text if len(text) <= length else text[:length] + "...")


def sync_folder(folder: Path) -> None:
    """Make the rename itself durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
