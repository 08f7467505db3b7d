"""Is a folder of weights whole, and what is in it?

Whole means: every file of a checkpoint has the digest of its manifest, every tensor is covered once
by pieces that are where the index says, and there is every tensor of the network and no other.
Hugging Face and torch_dist folders have no digests: there, damaged values can only be seen where
they are not finite. Nothing is held in memory but bands of rows, a few per thread.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from math import isfinite, prod, sqrt
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from r1mega.config import schema
from r1mega.weights import fp8
from r1mega.weights.blocks import scale_name, scale_region, weight_name
from r1mega.weights.checkpoints.checkpoint import REFERENCE, STATE, read_state
from r1mega.weights.checkpoints.manifest import (
    MANIFEST,
    CheckpointError,
    FileRecord,
    read_manifest,
    verify_file,
)
from r1mega.weights.inventory import take_inventory
from r1mega.weights.progress import Advance
from r1mega.weights.readers import Reader, is_torch_dist
from r1mega.weights.regions import extent
from r1mega.weights.slices import CHECKPOINT_INDEX, SliceReader
from r1mega.weights.streams import Band, stored_bands
from r1mega.weights.tensor_file import DTYPES, TensorFileError, num_bytes

THREADS = 4  # more than cores: some of them wait for the disk
_NORM_ELEMENTS = 1 << 18  # as float64 they stay in the processor's cache
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """``norm`` is the 2-norm of the finite entries, of what FP8 codes stand for."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    norm: float
    num_nan: int
    num_infinite: int

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape)) or "scalar"
        text = f"{self.dtype:8} {shape:>16} {self.norm:12.6g}  {self.name}"
        if self.num_nan or self.num_infinite:
            text += f"  {self.num_nan} NaN, {self.num_infinite} infinite"
        return text


@dataclass(frozen=True, slots=True)
class Summary:
    """What a folder holds as a whole; ``step``, ``layout`` and ``code`` only checkpoints say."""

    format: str
    architecture: str
    num_tensors: int
    num_parameters: int
    tensor_bytes: int
    file_bytes: int
    dtypes: tuple[str, ...]
    has_mtp: bool
    has_optimizer: bool
    has_reference: bool
    step: int | None = None
    layout: dict[str, Any] | None = None
    code: str | None = None

    def __str__(self) -> str:
        origin = ""
        if self.layout is not None:
            axes = {axis: n for axis, n in self.layout.items() if n not in (None, False, 1)}
            layout = " ".join(f"{axis}={n}" for axis, n in axes.items()) or "world=1"
            origin = f", step {self.step}, layout {layout}, written by r1mega {self.code}"
        parts = {"MTP layers": self.has_mtp, "optimizer": self.has_optimizer}
        parts["reference"] = self.has_reference
        return (
            f"{self.format} of {self.architecture}{origin}: {self.num_tensors:,} tensors "
            f"({', '.join(self.dtypes)}), {self.num_parameters:,} parameters, "
            f"{self.tensor_bytes:,} bytes of {self.file_bytes:,} in files; "
            + ", ".join(f"{part} {'yes' if there else 'no'}" for part, there in parts.items())
        )


def check_whole(
    reader: Reader, network: schema.Model, *, progress: Advance = lambda _: None
) -> None:
    """Raises ValueError with the first thing that is wrong, the first damaged tensor by name.

    Reads every file of a checkpoint, the headers of other folders.
    """
    if any((reader.folder / name).exists() for name in (MANIFEST, STATE, CHECKPOINT_INDEX)):
        _check_digests(reader.folder, progress)
        if (reader.folder / REFERENCE / CHECKPOINT_INDEX).exists():
            with SliceReader(reader.folder / REFERENCE) as reference:
                _check_entries(reference)
                take_inventory(network, reference.tensors, str(reference.folder))
    if isinstance(reader, SliceReader):
        _check_entries(reader)
    take_inventory(network, reader.tensors, str(reader.folder))


def describe(
    reader: Reader, names: Iterable[str], *, progress: Advance = lambda _: None
) -> Iterator[TensorFacts]:
    """What is in the tensors ``names``, in order.

    Raises ValueError for a piece whose digest is not that of a checkpoint's index.
    """
    return in_order(partial(_facts, reader, progress), names)


def summarize(reader: Reader, network: schema.Model) -> Summary:
    """From indices and headers alone."""
    folder, stored = reader.folder, reader.tensors
    state = read_state(folder) if (folder / STATE).exists() else None
    files = [path for path in folder.rglob("*") if path.is_file()]
    inventory = take_inventory(network, stored, str(folder))
    format_ = "checkpoint" if state else "torch_dist" if is_torch_dist(folder) else "Hugging Face"
    return Summary(
        format=format_,
        architecture=network.architecture,
        num_tensors=len(stored),
        num_parameters=sum(prod(t.shape) for name, t in stored.items() if not weight_name(name)),
        tensor_bytes=sum(num_bytes(t.dtype, t.shape) for t in stored.values()),
        file_bytes=sum(path.stat().st_size for path in files),
        dtypes=tuple(sorted({tensor.dtype for tensor in stored.values()})),
        has_mtp=inventory.mtp,
        has_optimizer=any(path.name.startswith("optimizer-") for path in files),
        has_reference=(folder / REFERENCE).is_dir(),
        step=state.progress.step if state else None,
        layout=asdict(state.layout) if state else None,
        code=state.code if state else None,
    )


def in_order(
    function: Callable[[_Item], _Result], items: Iterable[_Item], *, threads: int = THREADS
) -> Iterator[_Result]:
    """``map`` by a few threads, never far ahead of who takes the results."""
    pool = ThreadPoolExecutor(threads)
    ahead: deque[Future[_Result]] = deque()
    try:
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > 4 * threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def values_of(reader: Reader, band: Band) -> Tensor:
    """The numbers that a stored band stands for."""
    if band.values.dtype != DTYPES[fp8.CODES]:
        return band.values
    scales = reader.read_stored(scale_name(band.name), scale_region(band.region))
    (row, _), (column, _) = band.region
    return fp8.dequantize(band.values, scales, (row, column))


def _facts(reader: Reader, progress: Advance, name: str) -> TensorFacts:
    squares, num_nan, num_infinite = 0.0, 0, 0
    for band in stored_bands(reader, name):
        for values in values_of(reader, band).flatten().split(_NORM_ELEMENTS):
            norm = float(torch.linalg.vector_norm(values, dtype=torch.float64))
            if not isfinite(norm):
                num_nan += int(values.isnan().sum())
                num_infinite += int(values.isinf().sum())
                norm = float(values.double().nan_to_num(0.0, 0.0, 0.0).norm())
            squares += norm * norm
        progress(band.values.nbytes)
    stored = reader.tensors[name]
    return TensorFacts(name, stored.shape, stored.dtype, sqrt(squares), num_nan, num_infinite)


def _check_digests(folder: Path, progress: Advance) -> None:
    """The small files that say what the large ones hold come first."""
    files = sorted(read_manifest(folder).items(), key=lambda file: file[1].bytes)
    described = [file for file in files if not file[0].endswith(".safetensors")]
    shards = [file for file in files if file[0].endswith(".safetensors")]
    for _ in in_order(partial(_check_digest, folder, progress), [*described, *shards]):
        pass


def _check_digest(folder: Path, progress: Advance, file: tuple[str, FileRecord]) -> None:
    name, record = file
    try:
        verify_file(folder / name, record)
    except CheckpointError as error:
        damage = _first_damaged_tensor(folder / name) if name.endswith(".safetensors") else ""
        raise CheckpointError(f"{error}{damage}") from error
    progress(record.bytes)


def _first_damaged_tensor(path: Path) -> str:
    """Of a file that is not what it was, in words; "" where that cannot be said."""
    try:
        with SliceReader(path.parent) as reader:
            for name, stored in reader.tensors.items():
                if any(piece.file == path.name for piece in stored.pieces):
                    deque(stored_bands(reader, name), maxlen=0)
    except (ValueError, OSError) as error:
        return f"; first of all, {error}"
    return ""


def _check_entries(reader: SliceReader) -> None:
    """Index and files name the same things, and the same sizes of them."""
    indexed: dict[str, set[str]] = {}
    for name, stored in reader.tensors.items():
        for piece in stored.pieces:
            indexed.setdefault(piece.file, set()).add(piece.key)
            entry = reader.file(piece.file).entries.get(piece.key)
            found = None if entry is None else (entry.dtype, list(entry.shape))
            if found != (stored.dtype, extent(piece.region)):
                raise TensorFileError(
                    f"{reader.folder / piece.file}: {piece.key} is {found or 'not there'}, but "
                    f"the index says {(stored.dtype, extent(piece.region))} of {name}: copy the "
                    "folder anew"
                )
    for file, keys in indexed.items():
        if extra := sorted(reader.file(file).entries.keys() - keys):
            raise TensorFileError(
                f"{reader.folder / file} holds {extra[0]}, which the index does not name: it "
                "would be left out; copy the folder anew"
            )
