"""What makes a folder a whole checkpoint: a manifest with the size and digest of every other file.

    manifest.json   {"format", "files": {name: {"bytes", "xxh3_128"}}, "xxh3_128": of "files"}

A checkpoint is made under another name; the manifest is written last, then one rename commits it.
So what has its name and a manifest is whole, and damage that comes later is found by ``verify``.
The digest is no signature: who can write the files can write the manifest.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from r1mega.system.files import sync_folder, write_atomically
from r1mega.weights.slices import FORMAT, is_inside
from r1mega.weights.tensor_file import digest_file

MANIFEST = "manifest.json"


class CheckpointError(ValueError):
    """What is wrong with a checkpoint, and what to do."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file as it was written; ``digest`` is XXH3-128 of its bytes, in hexadecimal."""

    bytes: int
    digest: str


def record_bytes(content: bytes) -> FileRecord:
    """The record of a file with this content."""
    return FileRecord(len(content), xxhash.xxh3_128(content).hexdigest())


def read_manifest(folder: Path) -> dict[str, FileRecord]:
    """Every file of a checkpoint but the manifest, by its name relative to ``folder``.

    Raises CheckpointError when there is no manifest, or one that is damaged, of another format or
    names files elsewhere.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise CheckpointError(f"{folder} has no {MANIFEST}: it is not a whole checkpoint")
    try:
        manifest = json.loads(path.read_bytes())
        if (written := manifest["format"]) != FORMAT:
            raise CheckpointError(f"{folder} has the format {written!r}; only {FORMAT!r} is read")
        if manifest["xxh3_128"] != _digest(manifest["files"]):
            raise CheckpointError(f"{path} is damaged (its digest is another): use another one")
        files = {n: FileRecord(e["bytes"], e["xxh3_128"]) for n, e in manifest["files"].items()}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): use another checkpoint") from error
    for name in files:
        if not is_inside(name):
            raise CheckpointError(f"{path} names {name!r}, which is not inside {folder}")
    return files


def verify(folder: Path, *, part: int = 0, parts: int = 1) -> None:
    """Raises CheckpointError naming the first file that is missing or not as it was written.

    ``parts`` callers with one ``part`` each read every file once between them.
    """
    files = sorted(read_manifest(folder).items(), key=lambda item: (-item[1].bytes, item[0]))
    for name, record in files[part::parts]:
        verify_file(folder / name, record)


def verify_file(path: Path, record: FileRecord) -> None:
    """Raises CheckpointError unless ``path`` is as it was written."""
    try:
        size = path.stat().st_size
        found = digest_file(path) if size == record.bytes else ""
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: restore it or use another checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if size != record.bytes:
        raise CheckpointError(
            f"{path} is damaged ({size} bytes, {record.bytes} were written): use another checkpoint"
        )
    if found != record.digest:
        raise CheckpointError(
            f"{path} is damaged (its digest is not the manifest's): use another checkpoint"
        )


def commit(partial: Path, folder: Path, files: Mapping[str, FileRecord]) -> None:
    """Turn ``partial``, which holds exactly ``files``, all of them on disk, into ``folder``.

    A checkpoint that has the name already is replaced. Raises OSError when it cannot be written.
    """
    entries = {
        name: {"bytes": record.bytes, "xxh3_128": record.digest}
        for name, record in sorted(files.items())
    }
    for inner in {(partial / name).parent for name in files}:
        sync_folder(inner)
    manifest = {"format": FORMAT, "files": entries, "xxh3_128": _digest(entries)}
    write_atomically(partial / MANIFEST, json.dumps(manifest, indent=1))
    replaced = partial_folder(folder.with_name(f"{folder.name}.replaced"))
    if folder.exists():
        os.rename(folder, replaced)
    partial.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def partial_folder(folder: Path) -> Path:
    """Where a checkpoint is while it is made or removed."""
    return folder.with_name(f".{folder.name}.partial")


def remove(folder: Path) -> None:
    """At no moment does something with a checkpoint's name lack some of its files."""
    partial = partial_folder(folder)
    folder.rename(partial)
    shutil.rmtree(partial)


def _digest(entries: Any) -> str:
    """Of JSON values, whatever the white space between them."""
    return xxhash.xxh3_128(json.dumps(entries, sort_keys=True).encode()).hexdigest()
