"""One slice reader: rectangles of named tensors out of safetensors folders, and only their bytes.

A folder is either Hugging Face's (model.safetensors, or shards with model.safetensors.index.json)
or a checkpoint of ours (index.json: every tensor as rectangles in shard files). Names are Hugging
Face's in both, so loading, evaluation and conversion share this reader.
"""

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from r1mega.weights.names import Region

CHECKPOINT_INDEX = "index.json"
HF_INDEX = "model.safetensors.index.json"
HF_SINGLE = "model.safetensors"
_READ = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle of a tensor: ``file``'s entry ``key`` is ``tensor[region]``."""

    file: str
    key: str
    region: Region


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A named tensor and the pieces that together hold it."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    dtype: str = "F32"  # safetensors' name of it


class SliceReader:
    """Reads regions of tensors. Use as a context manager: it keeps its shard files open.

    Raises ValueError with the name for a tensor that is missing, mis-shaped, quantized or not fully
    covered.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        self._stack = ExitStack()
        self.tensors = self._open_index()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._stack.close()

    def check(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        """The stored tensor ``name``, if it has the ``shape`` that the model expects."""
        stored = self.tensors.get(name)
        if stored is None:
            raise ValueError(
                f"{self.folder}: no tensor {name!r}; is this a checkpoint of another model?"
            )
        if stored.shape != shape:
            raise ValueError(
                f"{self.folder}: {name} has shape {list(stored.shape)} but the model wants "
                f"{list(shape)}: it is a checkpoint of another model"
            )
        if stored.dtype not in _READ:
            raise ValueError(
                f"{self.folder}: {name} is stored as {stored.dtype}, and without its scales a "
                "quantized weight means nothing: convert the folder to BF16 first"
            )
        return stored

    def read(self, name: str, shape: tuple[int, ...], region: Region) -> Tensor:
        """``name[region]`` in the dtype it is stored in; ``shape`` is what the model expects."""
        stored = self.check(name, shape)
        out: Tensor | None = None
        covered = 0
        for piece in stored.pieces:
            overlap = intersect(piece.region, region)
            if overlap is None:
                continue
            part = self._file(piece.file).get_slice(piece.key)[_indices(overlap, piece.region)]
            if out is None:
                out = torch.empty([stop - start for start, stop in region], dtype=part.dtype)
            out[_indices(overlap, region)] = part
            covered += part.numel()
        if out is None or covered != out.numel():
            raise ValueError(
                f"{self.folder}: {name}{list(region)} is stored only in part; copy it anew"
            )
        return out

    def _open_index(self) -> dict[str, StoredTensor]:
        if (self.folder / CHECKPOINT_INDEX).exists():
            return read_checkpoint_index(self.folder)
        if (self.folder / HF_INDEX).exists():
            weight_map = json.loads((self.folder / HF_INDEX).read_text())["weight_map"]
        elif (self.folder / HF_SINGLE).exists():
            weight_map = dict.fromkeys(self._file(HF_SINGLE).keys(), HF_SINGLE)
        else:
            raise ValueError(
                f"{self.folder}: no {HF_SINGLE}, {HF_INDEX} or {CHECKPOINT_INDEX} here; name a "
                "Hugging Face folder or a step_NNNNNN checkpoint"
            )
        tensors = {}
        for name, file in weight_map.items():
            entry = self._file(file).get_slice(name)
            shape = tuple(entry.get_shape())
            whole = tuple((0, size) for size in shape)
            tensors[name] = StoredTensor(shape, (Piece(file, name, whole),), entry.get_dtype())
        return tensors

    def _file(self, file: str) -> Any:
        if file not in self._files:
            try:
                handle = safe_open(self.folder / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{self.folder / file} cannot be read: {error}") from error
            self._files[file] = self._stack.enter_context(handle)
        return self._files[file]


def read_checkpoint_index(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint of ours."""
    index = json.loads((folder / CHECKPOINT_INDEX).read_text())
    return {
        name: StoredTensor(
            tuple(entry["shape"]),
            tuple(
                Piece(p["file"], p["key"], tuple((a, b) for a, b in p["region"]))
                for p in entry["pieces"]
            ),
        )
        for name, entry in index["tensors"].items()
    }


def intersect(a: Region, b: Region) -> Region | None:
    """The rectangle two regions of one tensor share, or None."""
    both = tuple((max(a0, b0), min(a1, b1)) for (a0, a1), (b0, b1) in zip(a, b, strict=True))
    return both if all(start < stop for start, stop in both) else None


def _indices(region: Region, within: Region) -> tuple[slice, ...]:
    """Index of ``region`` inside the block that holds ``within``."""
    return tuple(
        slice(start - origin, stop - origin)
        for (start, stop), (origin, _) in zip(region, within, strict=True)
    )
