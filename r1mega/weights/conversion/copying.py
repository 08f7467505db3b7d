"""Fill the files of a folder from a reader; go on after a kill; read everything back.

The work is done in a folder that nobody takes for a finished one. Its journal names the work, which
is the source and where everything goes, and then every recipe done with the digests of what it
made. A second run of the same work goes on from there; any other starts anew. At the end each file
is read once and has to be, piece by piece, what was copied.
"""

import shutil
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TypeVar

import xxhash

from r1mega.weights.checkpoints.manifest import FileRecord
from r1mega.weights.conversion.journal import Journal
from r1mega.weights.progress import Listener, Meter
from r1mega.weights.readers import Reader
from r1mega.weights.regions import extent
from r1mega.weights.slices import StoredTensor
from r1mega.weights.streams import PieceDigests, Recipe, row_bands
from r1mega.weights.tensor_file import (
    DTYPES,
    TensorFile,
    TensorFileError,
    bytes_of,
    num_bytes,
    plan,
)

JOURNAL = ".journal"
_THREADS = 4  # more than cores: some of them wait for the disk
_Task = TypeVar("_Task")
_Table = dict[str, tuple[str, tuple[int, ...]]]  # of a file: dtype and shape by key
_Digests = dict[str, list[str]]  # by tensor, of its pieces in order


@dataclass(frozen=True, slots=True)
class Copied:
    """What is on disk now: tensors with the digests of their pieces, and the files."""

    tensors: dict[str, StoredTensor]
    files: dict[str, FileRecord]


def copy(
    source: Reader,
    recipes: Sequence[Recipe],
    targets: Mapping[str, StoredTensor],
    folder: Path,
    journal: Journal,
    listener: Listener,
) -> Copied:
    """Write everything that ``recipes`` make of ``source`` to its place in ``folder``.

    ``journal`` is the file JOURNAL of ``folder``. Raises ValueError when the source is damaged or
    the disk too small, OSError when the disk fills up or a file cannot be read; what is done by
    then is kept for the next call.
    """
    tables = _tables(targets)
    with ExitStack() as stack:
        _prepare(folder, tables, journal, _fingerprint(source, targets), listener)
        files = {n: stack.enter_context(TensorFile.open(folder / n, writable=True)) for n in tables}
        made: dict[str, _Digests] = journal.done
        meter = Meter("copied", _total_bytes(targets), listener)
        meter.advance(
            _total_bytes({name: targets[name] for done in made.values() for name in done})
        )

        def work(recipe: Recipe) -> None:
            made[recipe.name] = _make(recipe, source, targets, files, meter)
            journal.record(recipe.name, made[recipe.name])

        _in_threads(work, [recipe for recipe in recipes if recipe.name not in made])
        digests = dict(chain.from_iterable(done.items() for done in made.values()))
        copied = {name: _with_digests(targets[name], digests[name]) for name in targets}
        try:
            return Copied(copied, _audit(folder, tables, copied, listener))
        except TensorFileError:
            journal.forget()
            raise


def _make(
    recipe: Recipe,
    source: Reader,
    targets: Mapping[str, StoredTensor],
    files: Mapping[str, TensorFile],
    meter: Meter,
) -> _Digests:
    digests = {name: PieceDigests(targets[name].pieces) for name in recipe.makes}
    for band in recipe.bands(source):
        for piece, region, part in digests[band.name].cut(band):
            files[piece.file].write(piece.key, region, part)
        meter.advance(band.values.nbytes)
    return {name: [digest for _, digest in pieces] for name, pieces in digests.items()}


def _with_digests(target: StoredTensor, digests: Sequence[str]) -> StoredTensor:
    pieces = zip(target.pieces, digests, strict=True)
    return replace(target, pieces=tuple(replace(p, digest=digest) for p, digest in pieces))


def _prepare(
    folder: Path, tables: Mapping[str, _Table], journal: Journal, work: str, listener: Listener
) -> None:
    """All files at their full size, filled as far as the journal says."""
    if journal.work == work and _are_there(folder, tables):
        listener.note(f"going on with what is in {folder}")
        _check_space(folder, tables)
        return
    if journal.work is not None:
        listener.note(
            f"starting anew: {folder} was begun from another source or for another layout"
        )
    journal.forget()
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != JOURNAL:
            path.unlink()
    _check_space(folder, tables)
    for name, table in tables.items():
        with TensorFile.create(folder / name, table):
            pass
    journal.begin(work)


def _are_there(folder: Path, tables: Mapping[str, _Table]) -> bool:
    try:
        for name, table in tables.items():
            with TensorFile.open(folder / name) as file:
                if file.entries != plan(table)[1]:
                    return False
    except (OSError, TensorFileError):
        return False
    return True


def _check_space(folder: Path, tables: Mapping[str, _Table]) -> None:
    needed = sum(num_bytes(*described) for table in tables.values() for described in table.values())
    needed -= sum(path.stat().st_blocks * 512 for path in folder.iterdir())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"{folder.parent} has {free / 1e9:.2f} GB free, but {needed / 1e9:.2f} GB are to be "
            "written: make room or name another place"
        )


def _fingerprint(source: Reader, targets: Mapping[str, StoredTensor]) -> str:
    """Of all that decides what will be written; contents of the source by size and time."""
    state = xxhash.xxh3_128()
    for item in chain(source.tensors.items(), targets.items()):
        state.update(repr(item).encode())
    for path in sorted(source.folder.iterdir()):
        if path.is_file():
            status = path.stat()
            state.update(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode())
    return state.hexdigest()


def _tables(targets: Mapping[str, StoredTensor]) -> dict[str, _Table]:
    """What each file holds, wide items first: then all of them are aligned."""
    tables: dict[str, _Table] = {}
    for stored in sorted(targets.values(), key=lambda stored: -DTYPES[stored.dtype].itemsize):
        for piece in stored.pieces:
            entry = stored.dtype, tuple(extent(piece.region))
            tables.setdefault(piece.file, {})[piece.key] = entry
    return dict(sorted(tables.items()))


def _audit(
    folder: Path,
    tables: Mapping[str, _Table],
    copied: Mapping[str, StoredTensor],
    listener: Listener,
) -> dict[str, FileRecord]:
    """Raises TensorFileError unless every file is on disk and is what was copied."""
    digests: dict[str, dict[str, str]] = {name: {} for name in tables}
    for stored in copied.values():
        for piece in stored.pieces:
            digests[piece.file][piece.key] = piece.digest
    meter = Meter("verified", _total_bytes(copied), listener)
    records = {}

    def work(name: str) -> None:
        records[name] = _audit_file(folder / name, tables[name], digests[name], meter)

    _in_threads(work, tables)
    return {name: records[name] for name in tables}


def _audit_file(path: Path, table: _Table, digests: Mapping[str, str], meter: Meter) -> FileRecord:
    header, entries = plan(table)
    with path.open("rb") as file:
        whole = xxhash.xxh3_128(found := file.read(len(header)))
    wrong = [] if found == header else ["the header"]
    with TensorFile.open(path) as tensors:
        tensors.sync()
        for key, entry in entries.items():
            state = xxhash.xxh3_128()
            for region in row_bands(entry.shape, entry.itemsize):
                view = bytes_of(tensors.read(key, region))
                whole.update(view)
                state.update(view)
                meter.advance(len(view))
            wrong += [] if state.hexdigest() == digests[key] else [key]
    if wrong:
        raise TensorFileError(
            f"{path}: {wrong[0]} read back is not what was written: run this again, which starts "
            "anew, and have the disk checked"
        )
    return FileRecord(path.stat().st_size, whole.hexdigest())


def _total_bytes(tensors: Mapping[str, StoredTensor]) -> int:
    return sum(num_bytes(stored.dtype, stored.shape) for stored in tensors.values())


def _in_threads(work: Callable[[_Task], None], tasks: Iterable[_Task]) -> None:
    """``work`` on every task, first ones first; the first error ends it when the tasks under way
    are done, and is raised."""
    pending = deque(tasks)

    def drain() -> None:
        while pending:
            try:
                task = pending.popleft()
            except IndexError:  # another thread was quicker
                return
            work(task)

    with ThreadPoolExecutor(_THREADS) as pool:
        drains = [pool.submit(drain) for _ in range(_THREADS)]
        try:
            for drained in as_completed(drains):
                drained.result()
        finally:
            pending.clear()
