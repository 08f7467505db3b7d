"""What rank 0 does for a checkpoint: its folder, the files that describe it, and the commit."""

import errno
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from r1mega.system.files import write_files
from r1mega.weights.checkpoints.checkpoint import COMPANIONS, REFERENCE, STATE, State
from r1mega.weights.checkpoints.manifest import (
    CheckpointError,
    FileRecord,
    commit,
    partial_folder,
    read_manifest,
    record_bytes,
)
from r1mega.weights.checkpoints.shares import Shares
from r1mega.weights.slices import CHECKPOINT_INDEX

_NO_LINKS = {errno.EPERM, errno.EXDEV, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS}


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a rank wrote, or why it could not; digests are of its share of the tensors."""

    files: dict[str, FileRecord] = field(default_factory=dict)
    digests: list[str] = field(default_factory=list)
    reference_digests: list[str] = field(default_factory=list)
    error: str = ""


def start_folder(folder: Path) -> None:
    """An empty folder for what becomes ``folder``, after clearing away what a kill left behind."""
    for leftover in folder.parent.glob(partial_folder(Path("*")).name):
        shutil.rmtree(leftover)
    (partial_folder(folder) / REFERENCE).mkdir(parents=True)


def assemble(
    folder: Path,
    reports: Sequence[Report],
    *,
    shares: Shares,
    state: State,
    companions: Mapping[str, bytes],
    reference: Path | None,
) -> None:
    """Complete and commit what all ranks wrote for ``folder``.

    ``reference``: the checkpoint that has the reference policy, where the ranks did not write it.
    Raises CheckpointError when a rank could not write, OSError when this one cannot.
    """
    if errors := [report.error for report in reports if report.error]:
        raise CheckpointError(errors[0])
    partial = partial_folder(folder)
    files = {name: record for report in reports for name, record in report.files.items()}
    texts = {f"{COMPANIONS}/{name}": content for name, content in companions.items()}
    texts[CHECKPOINT_INDEX] = shares.index([r.digests for r in reports]).encode()
    texts[STATE] = state.text().encode()
    if reference is not None:
        files |= _link_reference(reference, partial)
    elif any(report.reference_digests for report in reports):
        index = shares.index([r.reference_digests for r in reports])
        texts[f"{REFERENCE}/{CHECKPOINT_INDEX}"] = index.encode()
    else:
        (partial / REFERENCE).rmdir()
    write_files(partial, texts)
    commit(partial, folder, files | {name: record_bytes(text) for name, text in texts.items()})


def _link_reference(source: Path, partial: Path) -> dict[str, FileRecord]:
    """The files of the reference policy once more: as links, or as copies where there are none."""
    records = {
        name: record
        for name, record in read_manifest(source).items()
        if name.startswith(f"{REFERENCE}/")
    }
    for name in records:
        try:
            os.link(source / name, partial / name)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            shutil.copyfile(source / name, partial / name)
            with (partial / name).open("rb") as file:
                os.fsync(file.fileno())
    return records
