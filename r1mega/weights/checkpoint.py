"""Checkpoints without pickle: safetensors shards, an index, and a manifest that is the commit.

    step_000040/
      weights-00000.safetensors    the rectangles of Hugging Face tensors that rank 0 owns
      optimizer-00000.safetensors  rank 0's ungathered ranges: fp32 weights, moments, step counts
      rng-00000.safetensors        generator states
      reference/                   the reference policy, if any: weights-*.safetensors, index.json
      index.json                   every tensor: shape and pieces (file, key, region)
      state.json                   step, data position, versions, layout, the network
      manifest.json                bytes and SHA-256 of every file above

Everything is written under ``.step_000040.partial`` and renamed last, so what has its name is
whole; a byte that flips later is found by ``verify``. All functions that take groups are
collective.
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from r1mega.config import schema
from r1mega.parallel.collectives import gather_records
from r1mega.parallel.groups import Groups
from r1mega.system.files import sync_folder, write_atomically
from r1mega.weights.local import LocalWeights, region_owners
from r1mega.weights.slices import CHECKPOINT_INDEX

FORMAT = "r1mega-checkpoint-1"
MANIFEST = "manifest.json"
STATE = "state.json"
REFERENCE = "reference"


class CheckpointError(ValueError):
    """What is wrong with a checkpoint, and what to do."""


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
    partial = checkpoints / f".{folder.name}.partial"
    if groups.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / REFERENCE).mkdir(parents=True)
    dist.barrier(groups.world)
    report = _write_shards(partial, weights, reference, optimizer, rng)
    reports = gather_records(report, _Report, group=groups.world, device=device)
    if errors := [r.error for r in reports if r.error]:
        if groups.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{folder} was not written: {errors[0]}; the run's last checkpoint stands"
        )
    if groups.rank == 0:
        _commit(partial, folder, progress, weights, reference is not None, reports)
    dist.barrier(groups.world)
    return folder


def verify(folder: Path) -> None:
    """Raises CheckpointError naming the first file that is missing or not as it was written."""
    if not (folder / MANIFEST).exists():
        raise CheckpointError(f"{folder} has no {MANIFEST}: it is not a whole checkpoint")
    for name, entry in json.loads((folder / MANIFEST).read_text())["files"].items():
        path = folder / name
        if not path.exists():
            raise CheckpointError(f"{path} is missing: restore it or use another checkpoint")
        if path.stat().st_size != entry["bytes"] or digest(path) != entry["sha256"]:
            raise CheckpointError(
                f"{path} is damaged (its SHA-256 is not the manifest's): use another checkpoint"
            )


def newest(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and why any newer one was skipped."""
    skipped: list[str] = []
    for folder in sorted(checkpoints.glob("step_*"), reverse=True):
        try:
            verify(folder)
        except CheckpointError as error:
            skipped.append(str(error))
            continue
        return folder, skipped
    return None, skipped


def read_progress(folder: Path) -> Progress:
    return Progress(**json.loads((folder / STATE).read_text())["progress"])


def check_resumable(folder: Path, weights: LocalWeights) -> None:
    """Raises CheckpointError when the network or the layout differ from what was saved."""
    state = json.loads((folder / STATE).read_text())
    if differing := _differences(state["model"], _network(weights.model)):
        raise CheckpointError(f"{folder} is a checkpoint of another model: {differing}")
    if differing := _differences(state["layout"], asdict(weights.layout)):
        raise CheckpointError(
            f"{folder} was written under another layout ({differing}); resume under the old one, "
            f"or start a new run from its weights with model.init={folder}"
        )


def load_rank_tensors(folder: Path, kind: str, rank: int) -> dict[str, Tensor]:
    """``kind`` is "optimizer" or "rng"."""
    return load_file(folder / _shard(kind, rank))


def prune(checkpoints: Path, keep_last: int) -> None:
    """Remove all but the newest ``keep_last`` checkpoints."""
    for folder in sorted(checkpoints.glob("step_*"))[:-keep_last]:
        shutil.rmtree(folder)


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Report:
    """What a rank wrote: file name -> (bytes, SHA-256), or why it could not."""

    files: dict[str, tuple[int, str]]
    error: str = ""


def _shard(kind: str, rank: int) -> str:
    return f"{kind}-{rank:05d}.safetensors"


def _write_shards(
    partial: Path,
    weights: LocalWeights,
    reference: list[Tensor] | None,
    optimizer: dict[str, Tensor],
    rng: dict[str, Tensor],
) -> _Report:
    files: dict[str, tuple[int, str]] = {}

    def write(name: str, tensors: dict[str, Tensor]) -> None:
        path = partial / name
        save_file(tensors, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[name] = (path.stat().st_size, digest(path))

    try:
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
    except (OSError, SafetensorError) as error:
        return _Report(files={}, error=f"rank {weights.rank}: {error}")
    return _Report(files=files)


def _owned_regions(weights: LocalWeights) -> dict[str, Tensor]:
    owners = region_owners(weights.model, weights.layout)
    return {
        piece.hf_name: weights.region(piece).to("cpu", copy=True).contiguous()
        for piece in weights.slices
        if owners[piece.hf_name][1][piece.region] == weights.rank
    }


def _commit(
    partial: Path,
    folder: Path,
    progress: Progress,
    weights: LocalWeights,
    has_reference: bool,
    reports: list[_Report],
) -> None:
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
    files = {name: entry for report in reports for name, entry in report.files.items()}
    for name, text in texts.items():
        write_atomically(partial / name, text)
        files[name] = (len(text.encode()), digest(partial / name))
    manifest = {
        "format": FORMAT,
        "files": {n: {"bytes": size, "sha256": sha} for n, (size, sha) in sorted(files.items())},
    }
    write_atomically(partial / MANIFEST, json.dumps(manifest, indent=1))
    if folder.exists():  # a run that resumed from before this step writes it anew
        shutil.rmtree(folder)
    partial.rename(folder)
    sync_folder(folder.parent)


def _index(weights: LocalWeights) -> dict[str, Any]:
    """Pure arithmetic: every rank's pieces follow from the table of names and the layout."""
    return {
        "format": FORMAT,
        "tensors": {
            name: {
                "shape": shape,
                "pieces": [
                    {"file": _shard("weights", owner), "key": name, "region": region}
                    for region, owner in owners.items()
                ],
            }
            for name, (shape, owners) in region_owners(weights.model, weights.layout).items()
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
