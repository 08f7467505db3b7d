"""Write weights as a distributed checkpoint that Megatron-Core 0.16.1 loads under any layout.

torch's own writer does it: the plan is made here, chunk by chunk, and each chunk is assembled when
the writer asks for it, so that memory is bounded by a few chunks whatever the model's size. Only
weights: no optimizer state, no step, no generator states.
"""

import io
import json
import shutil
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    CheckpointException,
    DefaultSavePlanner,
    FileSystemWriter,
    SavePlan,
    save,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from r1mega.config import network, schema
from r1mega.system.files import sync_folder, write_files
from r1mega.weights import fp8
from r1mega.weights.checkpoints.checkpoint import COMPANIONS
from r1mega.weights.checkpoints.manifest import partial_folder
from r1mega.weights.progress import Advance
from r1mega.weights.readers import Reader, check_outside
from r1mega.weights.regions import Region, extent, indices, intersect, moved, volume
from r1mega.weights.tensor_file import DTYPES
from r1mega.weights.torch_dist.reader import (
    Home,
    MegatronTensor,
    Part,
    leading_sizes,
    megatron_tensors,
    stacked_home,
)

_CHUNK_BYTES = 16 << 20
_STRATEGY = {  # what dist_checkpointing.load looks for before anything else
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Some rows of a Megatron tensor: a region of the checkpoint's tensor, and what is in it."""

    region: Region
    dtype: torch.dtype
    parts: tuple[Part, ...]


def export(
    reader: Reader,
    model: schema.Model,
    target: Path,
    *,
    fused_norms: bool,
    companions: Mapping[str, bytes] = MappingProxyType({}),
    threads: int = 4,
    progress: Advance = lambda _: None,
) -> None:
    """Write the weights that ``reader`` holds to the new folder ``target``; FP8 as BF16.

    ``fused_norms``: under the keys of TransformerEngine's layer spec, otherwise of the local one.
    ``companions``, files by name, go into its folder hf, where ``read_network`` looks for a
    config.json. ``progress`` is told of bytes as they are read. Raises ValueError when something
    cannot be read or written; then there is no ``target``.
    """
    check_outside(target, reader.folder)
    if target.exists():
        raise ValueError(f"{target} is there already: name a new folder, or remove it")
    planner = _Planner(reader, model, fused_norms, progress)
    partial = partial_folder(target)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _check_space(partial, planner.num_bytes)
        writer = FileSystemWriter(partial, thread_count=threads)
        with warnings.catch_warnings(), _threads_that_raise():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it should be
            save({}, storage_writer=writer, planner=planner, no_dist=True)
        texts = {f"{COMPANIONS}/{name}": content for name, content in companions.items()}
        texts["common.pt"] = _saved({}).getvalue()
        texts["metadata.json"] = json.dumps(_STRATEGY).encode()
        write_files(partial, texts)
        sync_folder(partial)
        partial.rename(target)
        sync_folder(target.parent)
    except (CheckpointException, OSError, ValueError) as error:
        raise ValueError(f"{target} was not written: {_cause(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _threads_that_raise() -> Iterator[None]:
    """Raises what ended a thread: torch's writer would leave out what the thread had to write."""
    ended: list[BaseException] = []
    before = threading.excepthook

    def note(ending: threading.ExceptHookArgs) -> None:
        if ending.exc_value is not None:
            ended.append(ending.exc_value)

    threading.excepthook = note
    try:
        yield
    finally:
        threading.excepthook = before
        if ended:
            raise ended[0]


def _cause(error: BaseException) -> BaseException:
    """torch's exception, a BaseException, has the real one inside."""
    if isinstance(error, CheckpointException):
        return next(cause for cause, _ in error.failures.values())
    return error


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"the disk has {free / 1e9:.2f} GB free, but {needed / 1e9:.2f} GB are to be written: "
            "make room or name another place"
        )


class _Planner(DefaultSavePlanner):
    """What to write, and each piece of it at the time it is written."""

    def __init__(
        self,
        reader: Reader,
        model: schema.Model,
        fused_norms: bool,
        progress: Advance,
    ) -> None:
        super().__init__(flatten_state_dict=False)
        self._reader = reader
        self._progress = progress
        self._chunks: dict[MetadataIndex, _Chunk] = {}
        self._items: list[WriteItem] = []
        modules: dict[str, None] = {}
        mtp = any(_is_mtp(name, model) for name in reader.tensors)
        for tensor in megatron_tensors(model, mtp=mtp):
            name = tensor.fused if fused_norms or network.is_dense(model) else tensor.local
            home = stacked_home(name, model)
            leading = leading_sizes(home, model)
            self._add_tensor(tensor, home, leading)
            modules |= dict.fromkeys(_stateful_modules(home, leading))
        for module in modules:
            self._items.append(WriteItem(MetadataIndex(module), WriteItemType.BYTE_IO))

    @property
    def num_bytes(self) -> int:
        """Of all that is to be written."""
        return sum(volume(c.region) * c.dtype.itemsize for c in self._chunks.values())

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(self._items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """Called by the writer's threads."""
        if write_item.type == WriteItemType.BYTE_IO:
            return _saved([None])  # as megatron-core writes it for a module without extra state
        chunk = self._chunks[write_item.index]
        values = torch.empty(extent(chunk.region), dtype=chunk.dtype)
        for part in chunk.parts:
            if overlap := intersect(part.region, chunk.region):
                values[indices(overlap, chunk.region)] = self._read(part, overlap)
        self._progress(values.nbytes)
        return values

    def _read(self, part: Part, overlap: Region) -> Tensor:
        region = moved(overlap, part.region, part.hf_region)
        shape = self._reader.tensors[part.hf_name].shape
        return self._reader.read(part.hf_name, shape, region).view(extent(overlap))

    def _add_tensor(self, tensor: MegatronTensor, home: Home, leading: tuple[int, ...]) -> None:
        dtype = self._dtype(tensor)
        parts = tuple(part for piece in tensor.slices for part in tensor.parts(piece, home))
        first = tuple((i, i + 1) for i in home.index)
        whole_columns = tuple((0, size) for size in tensor.shape[1:])
        rows = max(1, _CHUNK_BYTES // (prod(tensor.shape[1:]) * dtype.itemsize))
        for start in range(0, tensor.rows, rows):
            region = (*first, (start, min(start + rows, tensor.rows)), *whole_columns)
            held = tuple(part for part in parts if intersect(part.region, region))
            offsets = torch.Size([begin for begin, _ in region])
            index = MetadataIndex(home.key, offsets)
            self._chunks[index] = _Chunk(region, dtype, held)
            data = TensorWriteData(
                chunk=ChunkStorageMetadata(offsets, torch.Size(extent(region))),
                properties=TensorProperties(dtype=dtype),
                size=torch.Size((*leading, *tensor.shape)),
            )
            self._items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))

    def _dtype(self, tensor: MegatronTensor) -> torch.dtype:
        """Of what Megatron keeps as one tensor; raises ValueError when a part is another's."""
        found: dict[str, str] = {}
        for piece in tensor.slices:
            name = piece.hf_name
            if (stored := self._reader.tensors.get(name)) is None or stored.shape != piece.hf_shape:
                there = f"{list(stored.shape)}" if stored else "missing"
                raise ValueError(
                    f"{self._reader.folder}: {name} is {there}, but the network has "
                    f"{list(piece.hf_shape)}: is it a checkpoint of another model?"
                )
            found[name] = "BF16" if stored.dtype == fp8.CODES else stored.dtype
        if len(set(found.values())) > 1:
            raise ValueError(
                f"{self._reader.folder}: Megatron keeps {', '.join(found)} in one tensor, but they "
                f"are {', '.join(found.values())}: convert them to one dtype first"
            )
        return DTYPES[next(iter(found.values()))]


def _stateful_modules(home: Home, leading: tuple[int, ...]) -> Iterator[str]:
    """The objects that Megatron keeps beside a layer's weights: TransformerEngine's extra states.

    The local layer spec asks for them too, and both refuse a checkpoint that lacks one. What a
    network does not ask for is not read.
    """
    if ".layers." not in home.key:
        return
    place = ".".join(map(str, home.index or (0,)))
    shape = ".".join(map(str, leading or (1,)))
    block, attention, _ = home.key.partition("self_attention.")
    modules = [home.key.rpartition(".")[0]]
    if attention:
        modules.append(f"{block}{attention}core_attention")
    for module in modules:
        yield f"{module}._extra_state/shard_{place}_{shape}"


def _saved(value: Any) -> io.BytesIO:
    content = io.BytesIO()
    torch.save(value, content)
    return content


def _is_mtp(name: str, model: schema.Model) -> bool:
    return any(
        name.startswith(f"model.layers.{model.num_hidden_layers + depth}.")
        for depth in range(model.num_nextn_predict_layers)
    )
