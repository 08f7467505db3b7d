"""Checkpoints that are written while training goes on.

``Saver.save`` copies what a rank has to store into host memory of its own and returns; a thread per
rank writes it. The threads use no collective: they report through the job's store, and when all
have, rank 0 completes the checkpoint, commits it and removes old ones. One save is on its way at
most. One that fails is said by the next ``save`` or by ``finish``, on every rank, and leaves what
was saved before as it is.
"""

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from threading import Event, Thread

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from r1mega import __version__
from r1mega.parallel.collectives import await_keys, gather_records
from r1mega.parallel.groups import Groups
from r1mega.weights.checkpoints.assembly import Report, assemble, start_folder
from r1mega.weights.checkpoints.checkpoint import (
    REFERENCE,
    Progress,
    State,
    prune,
    shard,
    step_folder,
)
from r1mega.weights.checkpoints.host_file import HostFile, Part
from r1mega.weights.checkpoints.manifest import CheckpointError, partial_folder
from r1mega.weights.checkpoints.shares import Shares
from r1mega.weights.local import LocalWeights

logger = logging.getLogger(__name__)

_GRACE_S = 10.0  # for other ranks, at least
_WEIGHTS, _REFERENCE_WEIGHTS = "weights", f"{REFERENCE}/weights"


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """What this rank has beside its weights: live tensors, and a copy of the reference policy.

    The same list as ``reference`` means the same weights.
    """

    optimizer: dict[str, Tensor]
    rng: dict[str, Tensor]
    reference: list[Tensor] | None


class Saver:
    """Opens on every rank; ``save`` and ``finish`` are collective.

    ``companions`` are the contents of the folder ``hf`` by file name; rank 0 writes them.
    """

    def __init__(
        self,
        checkpoints: Path,
        weights: LocalWeights,
        *,
        companions: Mapping[str, bytes],
        keep_last: int,
        groups: Groups,
        store: dist.Store,
        device: torch.device,
    ) -> None:
        self._checkpoints = checkpoints
        self._weights = weights
        self._companions = companions
        self._keep_last = keep_last
        self._groups = groups
        self._store = store
        self._device = device
        self._shares = Shares.of(weights)
        self._buffers: dict[str, HostFile] = {}
        self._numbers = count()
        self._writing: _Writing | None = None
        self._kept: tuple[list[Tensor], Path] | None = None

    def keep_reference(self, reference: list[Tensor], folder: Path) -> None:
        """``folder`` is a checkpoint that holds ``reference``: it need not be written again."""
        self._kept = reference, folder

    def save(self, progress: Progress, contents: Contents) -> None:
        """Start to write a checkpoint, once the one before is done.

        What is saved may change when this returns. Raises CheckpointError on every rank when the
        one before failed, or when there is no room for this one.
        """
        self.finish()
        started = time.perf_counter()
        self._weights.settle()
        folder, reference = step_folder(self._checkpoints, progress.step), contents.reference
        parts = {
            _WEIGHTS: self._shares.part(self._weights),
            "optimizer": Part.of(contents.optimizer),
            "rng": Part.of(contents.rng),
        }
        if reference is not None:
            parts[_REFERENCE_WEIGHTS] = self._shares.part(self._weights.holding(reference))
        linked = self._prepare(folder, parts, reference)
        if linked is not None:
            del parts[_REFERENCE_WEIGHTS]
            self._buffers.pop(_REFERENCE_WEIGHTS, None)
        writing = _Writing(
            folder=folder,
            progress=progress,
            reference=reference,
            linked=linked,
            files={kind: self._copy(kind, part) for kind, part in parts.items()},
            key=f"checkpoint/{next(self._numbers)}",
        )
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        logger.info("copied for %s in %.3f s", folder, time.perf_counter() - started)
        _start(lambda: self._write(writing), writing.done)
        self._writing = writing  # only now is there something that ``wind_down`` can wait for

    def finish(self) -> None:
        """Return when nothing is on its way any more; raises CheckpointError if it failed."""
        if (writing := self._writing) is None:
            return
        writing.done.result()
        (outcome,) = await_keys(self._store, [f"{writing.key}/outcome"])
        self._writing = None
        # No rank goes on, and perhaps takes the store along, before all know.
        gather_records("", str, group=self._groups.world, device=self._device)
        if self._groups.rank == 0:
            self._store.delete_key(f"{writing.key}/outcome")
        if outcome:
            raise CheckpointError(outcome.decode())
        if writing.reference is not None:
            self._kept = writing.reference, writing.folder

    def wind_down(self) -> None:
        """As ``finish`` where other ranks may be gone; raises nothing.

        All ranks write alike: once this one has written, the others get as long again.
        """
        if (writing := self._writing) is not None:
            began = time.monotonic()
            writing.written.wait()
            wait([writing.done], max(_GRACE_S, time.monotonic() - began))

    def _prepare(
        self, folder: Path, parts: Mapping[str, Part], reference: list[Tensor] | None
    ) -> Path | None:
        """Makes the folder, if there is room for it.

        Returns the checkpoint from which the reference policy can be linked, if there is one.
        """
        if self._kept is not None and self._kept[0] is not reference:
            self._kept = None  # and its memory
        kept = None if self._kept is None else self._kept[1]
        sizes = {kind: part.num_bytes for kind, part in parts.items()}
        needs = _Needs(reference=sizes.pop(_REFERENCE_WEIGHTS, 0), rest=sum(sizes.values()))
        if self._groups.rank == 0:
            needs = _survey(folder, kept, needs)
        every = gather_records(needs, _Needs, group=self._groups.world, device=self._device)
        first, needed = every[0], sum(n.rest for n in every)
        if not first.linkable:
            needed += sum(n.reference for n in every)
        if first.error:
            raise _not_written(folder, first.error)
        if needed > first.free:
            raise _not_written(
                folder,
                f"it needs {needed:,} bytes and the disk has {first.free:,} left: make room, or "
                "keep fewer checkpoints (stage.keep_last)",
            )
        return kept if first.linkable else None

    def _copy(self, kind: str, part: Part) -> HostFile:
        """A private copy, in the memory of the save before."""
        buffer = self._buffers.get(kind)
        if buffer is None or buffer.shapes != part.shapes:
            self._buffers.pop(kind, None)  # before there is a new one
            buffer = HostFile(part.shapes, pinned=self._device.type == "cuda")
            self._buffers[kind] = buffer
        buffer.copy(part)
        return buffer

    def _write(self, writing: "_Writing") -> None:
        """The thread: this rank's files, then on rank 0 the rest."""
        started, rank = time.perf_counter(), self._groups.rank
        try:
            report = _write_files(writing, rank)
        finally:
            writing.written.set()
        self._store.set(f"{writing.key}/{rank}", msgspec.json.encode(report).decode())
        if rank != 0:
            return
        outcome = self._complete(writing)
        self._store.set(f"{writing.key}/outcome", outcome)
        if outcome:
            logger.error("%s", outcome)
            return
        logger.info("saved %s in %.1f s", writing.folder, time.perf_counter() - started)
        try:
            prune(writing.folder, self._keep_last)
        except OSError as error:
            logger.warning("an old checkpoint could not be removed: %s", error)

    def _complete(self, writing: "_Writing") -> str:
        """Why the checkpoint could not be committed, or nothing."""
        keys = [f"{writing.key}/{rank}" for rank in range(self._groups.layout.world)]
        reports = [
            msgspec.json.decode(report, type=Report) for report in await_keys(self._store, keys)
        ]
        for key in keys:
            self._store.delete_key(key)
        state = State(
            progress=writing.progress,
            layout=self._weights.layout,
            spec=self._weights.spec,
            model=self._weights.model,
            code=__version__,
        )
        try:
            assemble(
                writing.folder,
                reports,
                shares=self._shares,
                state=state,
                companions=self._companions,
                reference=writing.linked,
            )
        except (CheckpointError, OSError) as error:
            shutil.rmtree(partial_folder(writing.folder), ignore_errors=True)
            return str(_not_written(writing.folder, str(error)))
        return ""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Writing:
    """A checkpoint on its way to disk."""

    folder: Path
    progress: Progress
    reference: list[Tensor] | None
    linked: Path | None  # the checkpoint that has the reference policy
    files: dict[str, HostFile]
    key: str  # of what is said about it in the store
    written: Event = field(default_factory=Event)  # this rank's files are on disk, or failed
    done: "Future[None]" = field(default_factory=Future)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Needs:
    """Bytes that a rank is about to write, and what rank 0 found."""

    reference: int
    rest: int
    free: int = 0
    linkable: bool = False
    error: str = ""


def _survey(folder: Path, kept: Path | None, needs: _Needs) -> _Needs:
    """Rank 0 makes the folder and looks at the disk."""
    try:
        start_folder(folder)
        free = shutil.disk_usage(folder.parent).free
    except OSError as error:
        return replace(needs, error=str(error))
    return replace(needs, free=free, linkable=kept is not None and (kept / REFERENCE).is_dir())


def _write_files(writing: _Writing, rank: int) -> Report:
    partial, files = partial_folder(writing.folder), writing.files
    try:
        records = {
            name: file.write(partial / name)
            for kind, file in files.items()
            for name in [shard(kind, rank)]
        }
    except OSError as error:
        return Report(error=f"rank {rank}: {error}")
    reference = files.get(_REFERENCE_WEIGHTS)
    return Report(
        files=records,
        digests=files[_WEIGHTS].digests(),
        reference_digests=[] if reference is None else reference.digests(),
    )


def _not_written(folder: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{folder} was not written: {why}; what was saved before it stands")


def _start(work: Callable[[], None], done: "Future[None]") -> None:
    """In a thread that does not keep the process from ending; ``done`` says how it went."""

    def run() -> None:
        try:
            work()
            done.set_result(None)
        except BaseException as error:
            done.set_exception(error)

    Thread(target=run, name="saver", daemon=True).start()
