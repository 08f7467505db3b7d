"""Megatron's and torch's distributed checkpoints ("torch_dist"), without running their pickles.

A folder holds ``.metadata``, a pickle that says which tensors there are and where their rectangles
lie, and ``*.distcp`` files, each many ``torch.save`` archives end to end. The pickle is read by an
unpickler that knows torch's own metadata classes and nothing else; the archives are read with
``weights_only=True``. Neither format has digests: damage to values cannot be seen.
"""

import io
import pickle
import struct
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.utils import _create_file_view

from r1mega.weights.regions import Region, extent, indices, intersect, partition_fault
from r1mega.weights.tensor_file import DTYPE_NAMES

METADATA = ".metadata"
_TRACKER = "latest_checkpointed_iteration.txt"  # Megatron-LM's, one folder up
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
# Plain records: to make one, or to set its fields, runs no code but its own constructor.
_RECORDS = {
    (cls.__module__, cls.__qualname__): cls
    for cls in (
        metadata.BytesStorageMetadata,
        metadata.ChunkStorageMetadata,
        metadata.Metadata,
        metadata.MetadataIndex,
        metadata.StorageMeta,
        metadata.TensorProperties,
        metadata.TensorStorageMetadata,
        metadata._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo,
        planner.SavePlan,
        planner.TensorWriteData,
        planner.WriteItem,
        planner.WriteItemType,
        torch.Size,
    )
}
_GLOBALS = _RECORDS | {
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("pathlib", "PosixPath"): PurePosixPath,
    # Megatron's subclasses up to 0.15, which add fields that no reader of weights needs.
    (_MEGATRON, "MCoreMetadata"): metadata.Metadata,
    (_MEGATRON, "MCoreSavePlan"): planner.SavePlan,
}
# What damaged bytes make pickle, zip and torch raise.
_UNREADABLE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
)


class TorchDistError(ValueError):
    """What is wrong with a torch_dist checkpoint, and what to do."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A rectangle of a tensor: one archive inside ``file``."""

    region: Region
    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class DistTensor:
    """A tensor of the checkpoint and the chunks that together hold it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


class TorchDistFolder:
    """Reads regions of the tensors of a folder, by Megatron's keys.

    Archives can only be read whole: each thread keeps the one that it read last, so that memory is
    bounded by the largest chunk for each. Raises TorchDistError.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors = _read_tensors(folder)
        self._last = threading.local()

    def read(self, key: str, region: Region) -> Tensor:
        """``key[region]``, copied."""
        tensor = self.tensors[key]
        out = torch.empty(extent(region), dtype=tensor.dtype)
        for chunk in tensor.chunks:
            if overlap := intersect(chunk.region, region):
                values = self._chunk(key, tensor, chunk)
                out[indices(overlap, region)] = values[indices(overlap, chunk.region)]
        return out

    def _chunk(self, key: str, tensor: DistTensor, chunk: Chunk) -> Tensor:
        if getattr(self._last, "chunk", None) == chunk:
            kept: Tensor = self._last.values
            return kept
        self._last.chunk = self._last.values = None  # frees the last one first
        values = self._load(key, chunk)
        if not isinstance(values, Tensor):
            raise TorchDistError(f"{self._where(key, chunk)} is a {type(values).__name__}")
        found = (values.dtype, list(values.shape))
        if found != (tensor.dtype, extent(chunk.region)):
            raise TorchDistError(
                f"{self._where(key, chunk)} is {found[0]} {found[1]}, but {METADATA} says "
                f"{tensor.dtype} {extent(chunk.region)}: copy the folder anew"
            )
        self._last.chunk, self._last.values = chunk, values
        return values

    def _load(self, key: str, chunk: Chunk) -> Any:
        path = self.folder / chunk.file
        try:
            with path.open("rb") as file:
                if path.stat().st_size < chunk.offset + chunk.length:
                    raise TorchDistError(f"{path} ends early: copy it anew")
                view: Any = _create_file_view(file, chunk.offset, chunk.length)
                return torch.load(view, map_location="cpu", weights_only=True)
        except TorchDistError:
            raise
        except _UNREADABLE as error:
            raise TorchDistError(
                f"{self._where(key, chunk)} cannot be read ({_first_line(error)}): copy it anew"
            ) from error

    def _where(self, key: str, chunk: Chunk) -> str:
        return f"{self.folder / chunk.file}: {key} at byte {chunk.offset}"


class _MetadataUnpickler(pickle._Unpickler):
    """Makes torch's metadata records and refuses every other name.

    In Python: the one in C takes memory for as many objects as damaged bytes may announce.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _GLOBALS:
            return _GLOBALS[module, name]
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise TorchDistError(
            f"its pickle asks for {module}.{name}, which no checkpoint's metadata needs: it was "
            "not read, and may be hostile"
        )


def _read_tensors(folder: Path) -> dict[str, DistTensor]:
    path = folder / METADATA
    if not path.is_file():
        hint = f"the folder that {_TRACKER} names" if (folder / _TRACKER).exists() else "another"
        raise TorchDistError(f"{folder} has no {METADATA}: it is no torch_dist folder; try {hint}")
    try:
        found = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
        if not isinstance(found, metadata.Metadata):
            raise TorchDistError(f"it holds a {type(found).__name__}")
        return dict(_tensors(found))
    except TorchDistError as error:
        raise TorchDistError(f"{path}: {error}") from error
    except _UNREADABLE as error:
        raise TorchDistError(
            f"{path} cannot be read ({_first_line(error)}): copy it anew"
        ) from error


def _tensors(found: metadata.Metadata) -> Iterator[tuple[str, DistTensor]]:
    for key, entry in found.state_dict_metadata.items():
        if not isinstance(entry, metadata.TensorStorageMetadata):
            continue
        shape = tuple(int(size) for size in entry.size)
        if entry.properties.dtype not in DTYPE_NAMES:
            raise TorchDistError(f"{key} is {entry.properties.dtype}")
        chunks = tuple(_chunk(key, c, found.storage_data) for c in entry.chunks)
        if fault := partition_fault(shape, (chunk.region for chunk in chunks)):
            raise TorchDistError(f"{key} is not whole: {fault}")
        yield key, DistTensor(shape, entry.properties.dtype, chunks)


def _chunk(key: str, chunk: metadata.ChunkStorageMetadata, storage: Any) -> Chunk:
    """Raises LookupError when the place of a chunk is not said."""
    info = storage[metadata.MetadataIndex(key, chunk.offsets)]
    file = PurePosixPath(info.relative_path)
    if file.is_absolute() or ".." in file.parts:
        raise TorchDistError(f"{key} is said to be in {file}, which is not inside the folder")
    if getattr(info, "transform_descriptors", None):
        raise TorchDistError(f"{key} is stored with {info.transform_descriptors}")
    region = tuple(
        (int(start), int(start) + int(size))
        for start, size in zip(chunk.offsets, chunk.sizes, strict=True)
    )
    return Chunk(region, str(file), int(info.offset), int(info.length))


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:160]}" if text else type(error).__name__
