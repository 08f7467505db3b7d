"""One slice reader: rectangles of named tensors out of safetensors folders, and only their bytes.

A folder is either Hugging Face's (model.safetensors, or shards with model.safetensors.index.json)
or a checkpoint of ours (index.json: every tensor as rectangles in shard files). Names are Hugging
Face's in both, so loading, evaluation, conversion and inspection share this reader. FP8 weights
(e4m3 with the scales of ``fp8``) are read as the numbers they stand for.
"""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from operator import index
from pathlib import Path, PurePosixPath
from typing import Any, Self

import torch
from torch import Tensor

from r1mega.weights import fp8
from r1mega.weights.blocks import BLOCK, scale_name, scale_region, scale_shape
from r1mega.weights.regions import (
    Region,
    extent,
    indices,
    intersect,
    partition_fault,
    whole,
    within,
)
from r1mega.weights.tensor_file import DTYPES, Entry, TensorFile

FORMAT = "r1mega-checkpoint-2"
CHECKPOINT_INDEX = "index.json"
HF_INDEX = "model.safetensors.index.json"
HF_SINGLE = "model.safetensors"
WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")  # of those that are not quantized


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle of a tensor: ``file``'s entry ``key`` is ``tensor[region]``."""

    file: str
    key: str
    region: Region
    digest: str = ""  # tensor_file.digest_tensor of it, where a checkpoint of ours says so


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A named tensor and the pieces that together hold it."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    dtype: str  # safetensors' name of it


class SliceReader:
    """Reads regions of tensors. Use as a context manager: it keeps its shard files open.

    Any number of threads may share one. Raises ValueError with the name for a tensor that is
    missing, mis-shaped, of a dtype that is no weight's or not fully covered, and for a file that
    is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, TensorFile] = {}
        self._stack = ExitStack()
        try:
            self.tensors = self._open_index()
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def check(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        """The stored tensor ``name``, if it has the ``shape`` that the model expects."""
        stored = self._stored(name)
        if stored.shape != shape:
            raise ValueError(
                f"{self.folder}: {name} has shape {list(stored.shape)} but the model wants "
                f"{list(shape)}: it is a checkpoint of another model"
            )
        if stored.dtype == fp8.CODES and len(shape) == 2:
            self._check_scales(name, stored)
        elif stored.dtype not in WEIGHT_DTYPES:
            raise ValueError(
                f"{self.folder}: {name} is stored as {stored.dtype}, which is no weight's; "
                f"readable are {', '.join(WEIGHT_DTYPES)} and {fp8.CODES} with its scales"
            )
        return stored

    def read(self, name: str, shape: tuple[int, ...], region: Region) -> Tensor:
        """``name[region]`` in the dtype it is stored in, FP8 weights as fp32.

        ``shape`` is what the model expects.
        """
        if self.check(name, shape).dtype != fp8.CODES:
            return self.read_stored(name, region)
        codes = self.read_stored(name, region)
        scales = self.read_stored(scale_name(name), scale_region(region))
        (row, _), (column, _) = region
        return fp8.dequantize(codes, scales, (row, column))

    def read_stored(self, name: str, region: Region) -> Tensor:
        """``name[region]`` as it is stored: FP8 weights as their codes."""
        stored = self._stored(name)
        out = torch.empty(extent(region), dtype=DTYPES[stored.dtype])
        covered = 0
        for piece in stored.pieces:
            overlap = intersect(piece.region, region)
            if overlap is None:
                continue
            file = self.file(piece.file)
            self._check_entry(name, stored, piece, file.entries.get(piece.key))
            part = file.read(piece.key, within(overlap, piece.region))
            if overlap == region:
                return part
            out[indices(overlap, region)] = part
            covered += part.numel()
        if covered != out.numel():
            raise ValueError(
                f"{self.folder}: {name}{list(region)} is stored only in part; copy it anew"
            )
        return out

    def file(self, name: str) -> TensorFile:
        """The open file ``name`` of the folder."""
        if name not in self._files:
            if not is_inside(name):
                raise ValueError(f"{self.folder}: its index names {name!r}, which is not inside it")
            try:
                handle = TensorFile.open(self.folder / name)
            except OSError as error:
                raise ValueError(
                    f"{self.folder / name} cannot be read: {error.strerror}; copy it anew"
                ) from error
            self._files[name] = self._stack.enter_context(handle)
        return self._files[name]

    def _stored(self, name: str) -> StoredTensor:
        if name not in self.tensors:
            raise ValueError(
                f"{self.folder}: no tensor {name!r}; is this a checkpoint of another model?"
            )
        return self.tensors[name]

    def _check_scales(self, name: str, stored: StoredTensor) -> None:
        scales = self.tensors.get(scale_name(name))
        if scales is None:
            raise ValueError(
                f"{self.folder}: {name} is stored as {stored.dtype} without its scales "
                f"{scale_name(name)!r}: without them a quantized weight means nothing"
            )
        wanted = StoredTensor(scale_shape(stored.shape), (), fp8.SCALES)
        if (scales.shape, scales.dtype) != (wanted.shape, wanted.dtype):
            raise ValueError(
                f"{self.folder}: the scales of {name} are {scales.dtype} {list(scales.shape)}, but "
                f"blocks of {BLOCK} x {BLOCK} have {wanted.dtype} {list(wanted.shape)}"
            )

    def _check_entry(
        self, name: str, stored: StoredTensor, piece: Piece, entry: Entry | None
    ) -> None:
        """The file has to say of a piece what the index says."""
        if entry is None or [entry.dtype, *entry.shape] != [stored.dtype, *extent(piece.region)]:
            there = "is not there" if entry is None else f"is {entry.dtype} {list(entry.shape)}"
            raise ValueError(
                f"{self.folder / piece.file}: {piece.key} {there}, but the index says "
                f"{stored.dtype} {extent(piece.region)} of {name}: copy the folder anew"
            )

    def _open_index(self) -> dict[str, StoredTensor]:
        if (self.folder / CHECKPOINT_INDEX).exists():
            return read_checkpoint_index(self.folder)
        if (self.folder / HF_INDEX).exists():
            (weight_map,) = _read_json(self.folder / HF_INDEX, "weight_map")
            if not isinstance(weight_map, dict):
                raise ValueError(f"{self.folder / HF_INDEX} has no map of names to files")
        elif (self.folder / HF_SINGLE).exists():
            weight_map = dict.fromkeys(self.file(HF_SINGLE).entries, HF_SINGLE)
        else:
            raise ValueError(
                f"{self.folder}: no {HF_SINGLE}, {HF_INDEX} or {CHECKPOINT_INDEX} here; name a "
                "Hugging Face folder or a step_NNNNNN checkpoint"
            )
        tensors = {}
        for name, file in weight_map.items():
            entry = self.file(file).entries.get(name)
            if entry is None:
                raise ValueError(f"{self.folder / file} lacks {name}, which {HF_INDEX} says it has")
            tensors[name] = StoredTensor(
                entry.shape, (Piece(file, name, whole(entry.shape)),), entry.dtype
            )
        return tensors


def read_checkpoint_index(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint of ours, each of them cut into disjoint pieces that are all of
    it; raises ValueError naming the first that is not."""
    path = folder / CHECKPOINT_INDEX
    found, tensors = _read_json(path, "format", "tensors")
    if found != FORMAT:
        raise ValueError(f"{path} has format {found!r}, but this version reads {FORMAT!r} only")
    try:
        stored = {name: _stored_tensor(entry) for name, entry in tensors.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({error!r}): copy it anew") from error
    for name, tensor in stored.items():
        if fault := partition_fault(tensor.shape, [piece.region for piece in tensor.pieces]):
            raise ValueError(f"{path}: {name} is not whole: {fault}; copy the folder anew")
    return stored


def _stored_tensor(entry: dict[str, Any]) -> StoredTensor:
    pieces = tuple(
        Piece(p["file"], p["key"], tuple((index(a), index(b)) for a, b in p["region"]), p["digest"])
        for p in entry["pieces"]
    )
    if outside := next((p.file for p in pieces if not is_inside(p.file)), None):
        raise ValueError(f"it names {outside!r}, which is not inside it")
    if not all(isinstance(p.digest, str) and p.digest for p in pieces):
        raise ValueError("a piece has no digest")
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"there is no dtype {entry['dtype']!r}")
    return StoredTensor(tuple(map(index, entry["shape"])), pieces, entry["dtype"])


def checkpoint_index(tensors: Mapping[str, StoredTensor]) -> str:
    """The content of index.json."""
    values = {
        name: {
            "shape": stored.shape,
            "dtype": stored.dtype,
            "pieces": [
                {"file": p.file, "key": p.key, "region": p.region, "digest": p.digest}
                for p in stored.pieces
            ],
        }
        for name, stored in tensors.items()
    }
    return json.dumps({"format": FORMAT, "tensors": values})


def is_inside(name: Any) -> bool:
    """Is it a path that leads nowhere but down?"""
    if not isinstance(name, str):
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _read_json(path: Path, *keys: str) -> tuple[Any, ...]:
    try:
        values = json.loads(path.read_text())
        return tuple(values[key] for key in keys)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error!r}): copy it anew") from error
