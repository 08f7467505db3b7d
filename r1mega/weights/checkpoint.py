"""Checkpoints without pickle: safetensors shards, an index, and a manifest that is the commit.

    step_000040/
      weights-00000.safetensors    the rectangles of Hugging Face tensors that rank 0 owns
      optimizer-00000.safetensors  rank 0's ungathered ranges: fp32 weights, moments, step counts
      rng-00000.safetensors        generator states
      reference/                   the reference policy, if any: weights-*.safetensors, index.json
      index.json                   every tensor: shape and pieces (file, key, region)
      state.json                   step, data position, versions, layout, the network
      manifest.json                bytes and digest of every file above

Everything is written under ``.step_000040.partial`` and renamed last, so what has its name is
whole; a byte that flips later is found by ``verify``. All functions that take groups are
collective.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from r1mega.config import schema
from r1mega.parallel.collectives import gather_records
from r1mega.parallel.groups import Groups
from r1mega.parallel.layout import Layout
from r1mega.system.files import write_atomically
from r1mega.weights.local import LocalWeights, wire_dtype
from r1mega.weights.manifest import (
    MANIFEST,
    CheckpointError,
    FileRecord,
    commit,
    partial_folder,
    record_bytes,
    remove,
    verify,
)
from r1mega.weights.slices import CHECKPOINT_INDEX, FORMAT
from r1mega.weights.tensor_file import DTYPE_NAMES, digest_file

STATE = "state.json"
REFERENCE = "reference"


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Where a run stands: what ``state.json`` says besides the layout and the network."""

    step: int
    data_position: int  # prompts or documents consumed
    rollout: int = 0  # rollouts finished
    version: int = 0  # of the weights the engines held


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step_{step:06d}"


def save(
    checkpoints: Path,
    progress: Progress,
    *,
    weights: LocalWeights,
    reference: list[Tensor] | None,
    optimizer: dict[str, Tensor],
    rng: dict[str, Tensor],
    groups: Groups,
    device: torch.device,
) -> Path:
    """Write one checkpoint; raises CheckpointError on every rank when any rank could not write."""
    folder = step_folder(checkpoints, progress.step)
    partial = partial_folder(folder)
    first = groups.rank == 0

    def together(work: Callable[[], _Files]) -> _Files:
        """Every rank does its ``work``; what all of them wrote, or the same error everywhere."""
        try:
            report = _Report(files=work())
        except (OSError, SafetensorError) as error:
            report = _Report(files={}, error=f"rank {groups.rank}: {error}")
        reports = gather_records(report, _Report, group=groups.world, device=device)
        if errors := [r.error for r in reports if r.error]:
            if first:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"{folder} was not written: {errors[0]}; what was saved before it stands"
            )
        return {name: entry for r in reports for name, entry in r.files.items()}

    weights.settle()
    together(lambda: _start(partial) if first else {})
    files = together(lambda: _write_shards(partial, weights, reference, optimizer, rng))
    has_reference = reference is not None
    together(
        lambda: _commit(partial, folder, progress, weights, has_reference, files) if first else {}
    )
    return folder


def newest(
    checkpoints: Path, verified: Callable[[Path], None] = verify
) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is ``verified``, and why any newer one was skipped."""
    skipped: list[str] = []
    for folder in _folders(checkpoints)[::-1]:
        try:
            verified(folder)
        except CheckpointError as error:
            skipped.append(str(error))
            continue
        return folder, skipped
    return None, skipped


def newest_committed(checkpoints: Path) -> Path | None:
    """The newest checkpoint that was finished; nothing but its manifest is read."""
    return next((f for f in _folders(checkpoints)[::-1] if (f / MANIFEST).is_file()), None)


def read_progress(folder: Path) -> Progress:
    return Progress(**json.loads((folder / STATE).read_text())["progress"])


def read_network(folder: Path) -> schema.Model:
    """The network a checkpoint holds, without where weights and tokenizer came from."""
    values = json.loads((folder / STATE).read_text())["model"]
    scaling = values.pop("rope_scaling")
    return schema.Model(**values, rope_scaling=scaling and schema.RopeScaling(**scaling))


def check_resumable(folder: Path, model: schema.Model, layout: Layout) -> None:
    """Raises CheckpointError when the network or the layout differ from what was saved."""
    state = json.loads((folder / STATE).read_text())
    if differing := _differences(state["model"], _network(model)):
        raise CheckpointError(f"{folder} is a checkpoint of another model: {differing}")
    if differing := _differences(state["layout"], asdict(layout)):
        raise CheckpointError(
            f"{folder} was written under another layout ({differing}); resume under the old one, "
            f"or start a new run from its weights with model.init={folder}"
        )


def load_rank_tensors(folder: Path, kind: str, rank: int) -> dict[str, Tensor]:
    """``kind`` is "optimizer" or "rng"."""
    return load_file(folder / _shard(kind, rank))


def prune(newest: Path, keep_last: int) -> None:
    """Of the checkpoints up to ``newest`` keep the last ``keep_last``.

    A later one can only be one that did not verify: it must not crowd out those that do.
    """
    up_to_newest = [folder for folder in _folders(newest.parent) if folder.name <= newest.name]
    for folder in up_to_newest[:-keep_last]:
        remove(folder)


_Files = dict[str, FileRecord]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Report:
    """What a rank wrote, or why it could not."""

    files: _Files
    error: str = ""


def _folders(checkpoints: Path) -> list[Path]:
    """Oldest first."""
    return sorted(checkpoints.glob("step_*"))


def _start(partial: Path) -> _Files:
    """An empty folder, after clearing away what a kill left of this one and of others."""
    for leftover in partial.parent.glob(partial_folder(Path("step_*")).name):
        shutil.rmtree(leftover)
    (partial / REFERENCE).mkdir(parents=True)
    return {}


def _shard(kind: str, rank: int) -> str:
    return f"{kind}-{rank:05d}.safetensors"


def _write_shards(
    partial: Path,
    weights: LocalWeights,
    reference: list[Tensor] | None,
    optimizer: dict[str, Tensor],
    rng: dict[str, Tensor],
) -> _Files:
    files: _Files = {}

    def write(name: str, tensors: dict[str, Tensor]) -> None:
        path = partial / name
        save_file(tensors, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[name] = FileRecord(path.stat().st_size, digest_file(path))

    write(_shard("weights", weights.rank), _owned_regions(weights))
    write(_shard("optimizer", weights.rank), optimizer)
    write(_shard("rng", weights.rank), rng)
    if reference is not None:
        weights.swap(reference)
        try:
            held = _owned_regions(weights)
        finally:
            weights.swap(reference)
        write(f"{REFERENCE}/{_shard('weights', weights.rank)}", held)
    return files


def _owned_regions(weights: LocalWeights) -> dict[str, Tensor]:
    return {
        piece.hf_name: weights.region(piece).to("cpu", copy=True).contiguous()
        for piece in weights.slices
        if weights.owners[piece.hf_name][1][piece.region] == weights.rank
    }


def _commit(
    partial: Path,
    folder: Path,
    progress: Progress,
    weights: LocalWeights,
    has_reference: bool,
    files: _Files,
) -> _Files:
    index = json.dumps(_index(weights))
    state = {
        "format": FORMAT,
        "progress": asdict(progress),
        "layout": asdict(weights.layout),
        "model": _network(weights.model),
    }
    texts = {CHECKPOINT_INDEX: index, STATE: json.dumps(state, indent=1)}
    if has_reference:
        texts[f"{REFERENCE}/{CHECKPOINT_INDEX}"] = index
    else:
        (partial / REFERENCE).rmdir()
    for name, text in texts.items():
        write_atomically(partial / name, text)
        files[name] = record_bytes(text.encode())
    commit(partial, folder, files)
    return files


def _index(weights: LocalWeights) -> dict[str, Any]:
    """Pure arithmetic: every rank's pieces follow from the table of names and the layout."""
    return {
        "format": FORMAT,
        "tensors": {
            name: {
                "shape": shape,
                "dtype": DTYPE_NAMES[wire_dtype(name, weights)],
                "pieces": [
                    {
                        "file": _shard("weights", owner),
                        "key": name,
                        "region": region,
                        "digest": "",
                    }
                    for region, owner in owners.items()
                ],
            }
            for name, (shape, owners) in weights.owners.items()
        },
    }


def _network(model: schema.Model) -> dict[str, Any]:
    """The sizes, without where weights and tokenizer came from."""
    return {k: v for k, v in asdict(model).items() if k not in ("init", "tokenizer")}


def _differences(saved: dict[str, Any], present: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} was {saved.get(key)}, is {value}"
        for key, value in present.items()
        if saved.get(key) != value
    )
