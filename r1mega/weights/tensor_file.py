"""Safetensors files by offset: any rectangle of a tensor in or out, and nothing else of the file.

The format: eight bytes that hold the header's length, a JSON header, then the tensors' bytes back
to back. Files are never mapped: mapped pages count as our memory, and a file that shrinks under a
mapping ends the process. A header is believed only when it accounts for every byte of the file.
"""

import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from operator import index
from pathlib import Path
from typing import Any, Self

import torch
import xxhash
from torch import Tensor

from r1mega.weights.regions import Region, extent, whole

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # as the safetensors library limits it
_ALIGNMENT = 8  # of the first tensor
_DIGEST_CHUNK = 8 << 20


class TensorFileError(ValueError):
    """What is wrong with a file, and what to do."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies: ``start`` counts bytes from the beginning of the file."""

    dtype: str  # safetensors' name of it
    shape: tuple[int, ...]
    start: int

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        return num_bytes(self.dtype, self.shape)


class TensorFile:
    """An open file whose tensors are read or written in part. Use as a context manager.

    Reads and writes at offsets: any number of threads may share one.
    """

    def __init__(self, path: Path, entries: Mapping[str, Entry], descriptor: int) -> None:
        self.path = path
        self.entries = entries
        self._descriptor = descriptor

    @classmethod
    def open(cls, path: Path, *, writable: bool = False) -> "TensorFile":
        """An existing file; raises TensorFileError when it is damaged, OSError when unreadable."""
        descriptor = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
        try:
            return cls(path, _read_header(path, descriptor), descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def create(cls, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> "TensorFile":
        """A new file of its full size, for ``tensors`` (dtype and shape by key); all bytes zero."""
        header, entries = plan(tensors)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            os.truncate(descriptor, len(header) + sum(e.nbytes for e in entries.values()))
            _write(descriptor, memoryview(header), 0)
            return cls(path, entries, descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def read(self, key: str, region: Region | None = None) -> Tensor:
        """``key[region]``, the whole tensor without one; only its bytes are read."""
        entry = self.entries[key]
        region = whole(entry.shape) if region is None else region
        out = torch.empty(extent(region), dtype=DTYPES[entry.dtype])
        view, done = bytes_of(out), 0
        for offset, length in runs(entry.shape, region):
            size = length * entry.itemsize
            start = entry.start + offset * entry.itemsize
            self._read_run(view[done : done + size], start)
            done += size
        return out

    def write(self, key: str, region: Region, values: Tensor) -> None:
        """Set ``key[region]``; ``values`` has the tensor's dtype and the region's extent."""
        entry = self.entries[key]
        if values.dtype != DTYPES[entry.dtype] or list(values.shape) != extent(region):
            raise ValueError(
                f"{key}{list(region)} is {entry.dtype} {extent(region)}, but got {values.dtype} "
                f"{list(values.shape)}"
            )
        view, done = bytes_of(values.contiguous()), 0
        for offset, length in runs(entry.shape, region):
            size = length * entry.itemsize
            _write(
                self._descriptor, view[done : done + size], entry.start + offset * entry.itemsize
            )
            done += size

    def sync(self) -> None:
        """Return when everything written is on disk."""
        os.fsync(self._descriptor)

    def _read_run(self, view: memoryview, start: int) -> None:
        done = 0
        while done < len(view):
            count = os.preadv(self._descriptor, [view[done:]], start + done)
            if count == 0:
                raise TensorFileError(f"{self.path} ends early: copy it anew")
            done += count


def plan(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, Entry]]:
    """The header of a file that holds ``tensors`` in this order, and where each will lie."""
    spans: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    position = 0
    for key, (dtype, shape) in tensors.items():
        size = num_bytes(dtype, shape)
        spans[key] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(spans, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    header = struct.pack("<Q", len(text)) + text
    entries = {
        key: Entry(dtype, tuple(shape), len(header) + spans[key]["data_offsets"][0])
        for key, (dtype, shape) in tensors.items()
    }
    return header, entries


def write_file(path: Path, header: bytes, body_B: Tensor) -> str:
    """Write a whole file, to the disk; returns XXH3-128 of its bytes, as ``digest_file`` would.

    ``header`` is ``plan``'s, and ``body_B`` holds the tensors' bytes one after the other.
    """
    state = xxhash.xxh3_128(header)
    view = bytes_of(body_B)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        _write(descriptor, memoryview(header), 0)
        for start in range(0, len(view), _DIGEST_CHUNK):
            block = view[start : start + _DIGEST_CHUNK]
            _write(descriptor, block, len(header) + start)
            state.update(block)  # while it is in the processor's cache
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return state.hexdigest()


def read_header(path: Path) -> dict[str, Entry]:
    """What ``path`` holds, by key; raises TensorFileError or OSError."""
    with TensorFile.open(path) as file:
        return dict(file.entries)


def digest_file(path: Path) -> str:
    """XXH3-128 of the file's bytes: finds damage at the speed of memory, and is no signature."""
    state = xxhash.xxh3_128()
    buffer = memoryview(bytearray(_DIGEST_CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            state.update(buffer[:count])
    return state.hexdigest()


def digest_tensor(values: Tensor) -> str:
    """XXH3-128 of the bytes, row-major."""
    return xxhash.xxh3_128(bytes_of(values.contiguous())).hexdigest()


def num_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Of a tensor; ``dtype`` is safetensors' name."""
    return prod(shape) * DTYPES[dtype].itemsize


def bytes_of(values: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host."""
    view: memoryview = octets(values).numpy().data
    return view


def octets(values: Tensor) -> Tensor:
    """The bytes of a tensor in row-major order: its own memory where that is contiguous."""
    return values.detach().contiguous().reshape(-1).view(torch.uint8)


def runs(shape: tuple[int, ...], region: Region) -> Iterator[tuple[int, int]]:
    """(offset, length) in elements of the unbroken stretches of ``region``, in row-major order."""
    if 0 in extent(region):
        return
    inner = len(shape)  # dimensions from here on are taken whole
    while inner and region[inner - 1] == (0, shape[inner - 1]):
        inner -= 1
    if inner == 0:
        yield 0, prod(shape)
        return
    strides = [prod(shape[axis + 1 :]) for axis in range(inner)]
    (start, stop), stride = region[inner - 1], strides[inner - 1]
    for place in product(*(range(*span) for span in region[: inner - 1])):
        origin = sum(i * s for i, s in zip(place, strides, strict=False))
        yield origin + start * stride, (stop - start) * stride


def _read_header(path: Path, descriptor: int) -> dict[str, Entry]:
    size = os.fstat(descriptor).st_size
    length = struct.unpack("<Q", os.pread(descriptor, 8, 0).ljust(8, b"\0"))[0]
    if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
        raise _damaged(path, f"a header of {length} bytes in a file of {size}")
    try:
        entries = _entries(json.loads(os.pread(descriptor, length, 8)), 8 + length)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"its header cannot be read: {error}") from error
    end = max((entry.start + entry.nbytes for entry in entries.values()), default=8 + length)
    if end != size:
        raise _damaged(path, f"{end} bytes expected, {size} there")
    return entries


def _entries(header: dict[str, Any], position: int) -> dict[str, Entry]:
    """In the order of the file; raises ValueError unless they lie back to back."""
    header.pop("__metadata__", None)
    spans = sorted((*span["data_offsets"], key, span) for key, span in header.items())
    entries = {}
    begin = position
    for start, stop, key, span in spans:
        shape = tuple(map(index, span["shape"]))
        if span["dtype"] not in DTYPES or min(shape, default=0) < 0:
            raise ValueError(f"{key} is {span['dtype']} {list(shape)}")
        entry = Entry(span["dtype"], shape, begin + index(start))
        if entry.start != position or entry.nbytes != stop - start:
            raise ValueError(f"{key} does not lie where it should")
        entries[key] = entry
        position += entry.nbytes
    return entries


def _damaged(path: Path, what: str) -> TensorFileError:
    return TensorFileError(f"{path} is damaged ({what}): copy it anew")


def _write(descriptor: int, view: memoryview, start: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], start + done)
