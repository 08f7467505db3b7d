"""Megatron's distributed checkpoints under Hugging Face names.

Megatron stores whole tensors, cut into chunks as the ranks that saved them were: what one process
would hold, so the table of names for one process says which rectangle of a Hugging Face tensor is
which rectangle of them. Besides, Megatron stacks what repeats, along leading dimensions: experts,
and the layers of networks whose layers are all alike. Its keys differ with the layer spec (which
fuses norms) and with the version that wrote them; reading takes whichever are there.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from r1mega.config import network, schema
from r1mega.parallel.layout import Layout
from r1mega.weights.names import ParameterSlice, Spec, parameter_slices
from r1mega.weights.regions import Region, extent, indices, intersect, moved
from r1mega.weights.slices import StoredTensor
from r1mega.weights.tensor_file import DTYPE_NAMES, DTYPES
from r1mega.weights.torch_dist.files import TorchDistError, TorchDistFolder

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"(.+\.mlp\.experts)\.local_experts\.(\d+)\.(.+)")
_NETWORK = ("embedding.", "decoder.", "mtp.", "output_layer.")  # what keys of weights begin with
_EMBEDDING = "embedding.word_embeddings.weight"
_PADDED = (_EMBEDDING, "output_layer.weight")  # to a multiple that divides among ranks


@dataclass(frozen=True, slots=True)
class Part:
    """``hf_name[hf_region]`` is ``region`` of a tensor of the checkpoint."""

    hf_name: str
    hf_region: Region
    region: Region


@dataclass(frozen=True, slots=True)
class Home:
    """Where a tensor of one process lies: ``key[index]``; ``alone``: one slice of it by itself."""

    key: str
    index: tuple[int, ...] = ()
    alone: bool = False


@dataclass(frozen=True, slots=True)
class MegatronTensor:
    """A tensor as one process would hold it, under either layer spec's name, and what is in it."""

    local: str
    fused: str
    slices: tuple[ParameterSlice, ...]

    @property
    def rows(self) -> int:
        return sum(stop - start for piece in self.slices for start, stop in piece.region[:1])

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, *self.slices[0].hf_shape[1:])

    def parts(self, piece: ParameterSlice, home: Home) -> Iterator[Part]:
        """Where ``piece`` of it lies, one for each of its blocks."""
        leading = tuple((i, i + 1) for i in home.index)
        height, target = piece.hf_shape[0] // piece.blocks, piece.target
        step = self.rows // piece.blocks
        for block in range(piece.blocks):
            hf_rows = (block * height, (block + 1) * height)
            start = block * step + (0 if home.alone else target[0][0])
            region = (*leading, (start, start + height), *target[1:])
            yield Part(piece.hf_name, (hf_rows, *piece.region[1:]), region)


class TorchDistReader:
    """A torch_dist folder that holds ``model``, read like Hugging Face tensors (``SliceReader``).

    Raises TorchDistError for a tensor that is missing, mis-shaped or unknown. Optimizer state is
    ignored.
    """

    def __init__(self, folder: Path, model: schema.Model) -> None:
        self.folder = folder
        self._stored = TorchDistFolder(folder)
        self._prefix = self._find_prefix()
        self._parts: dict[str, tuple[str, tuple[Part, ...]]] = {}
        self.tensors: dict[str, StoredTensor] = {}
        mtp = any(key.startswith(self._prefix + "mtp.") for key in self._stored.tensors)
        for tensor in megatron_tensors(model, mtp=mtp):
            self._place(tensor, model)
        self._refuse_unknown()

    def read(self, name: str, shape: tuple[int, ...], region: Region) -> Tensor:
        """``name[region]`` in the dtype it is stored in; ``shape`` is what the model expects."""
        if self.tensors[name].shape != shape:
            raise TorchDistError(
                f"{self.folder}: {name} has shape {list(self.tensors[name].shape)}, not "
                f"{list(shape)}: it is a checkpoint of another model"
            )
        return self.read_stored(name, region)

    def read_stored(self, name: str, region: Region) -> Tensor:
        """``name[region]``; there is nothing quantized in these checkpoints."""
        key, parts = self._parts[name]
        out = torch.empty(extent(region), dtype=DTYPES[self.tensors[name].dtype])
        for part in parts:
            if (overlap := intersect(part.hf_region, region)) is None:
                continue
            values = self._stored.read(key, moved(overlap, part.hf_region, part.region))
            out[indices(overlap, region)] = values.view(extent(overlap))
        return out

    def _find_prefix(self) -> str:
        """What some trainers write before every key ("module.")."""
        for key in self._stored.tensors:
            if key.endswith(_EMBEDDING) and "optimizer" not in key:
                return key.removesuffix(_EMBEDDING)
        raise TorchDistError(f"{self.folder} has no {_EMBEDDING}: it holds no GPTModel")

    def _place(self, tensor: MegatronTensor, model: schema.Model) -> None:
        stored = self._stored.tensors
        for piece in tensor.slices:
            homes = list(_possible_homes(tensor, piece))
            home = next((h for h in homes if self._prefix + h.key in stored), None)
            if home is None:
                raise TorchDistError(
                    f"{self.folder} has no {homes[0].key}, which {piece.hf_name} is read from: it "
                    "is a checkpoint of another network"
                )
            key = self._prefix + home.key
            shape = piece.hf_shape if home.alone else tensor.shape
            self._check(key, (*leading_sizes(home, model), *shape), padded=tensor.local in _PADDED)
            self._parts[piece.hf_name] = key, tuple(tensor.parts(piece, home))
            dtype = DTYPE_NAMES[stored[key].dtype]
            self.tensors[piece.hf_name] = StoredTensor(piece.hf_shape, (), dtype)

    def _check(self, key: str, wanted: tuple[int, ...], *, padded: bool) -> None:
        shape = self._stored.tensors[key].shape
        enough = padded and shape[:1] >= wanted[:1] and shape[1:] == wanted[1:]
        if shape != wanted and not enough:
            raise TorchDistError(
                f"{self.folder}: {key} has shape {list(shape)}, but the network has "
                f"{list(wanted)}: it is a checkpoint of another one"
            )

    def _refuse_unknown(self) -> None:
        known = {key for key, _ in self._parts.values()}
        begins = tuple(self._prefix + word for word in _NETWORK)
        for key in self._stored.tensors:
            if key.startswith(begins) and key not in known:
                raise TorchDistError(
                    f"{self.folder} holds {key}, which the network does not have: it is a "
                    "checkpoint of another one"
                )


def megatron_tensors(model: schema.Model, *, mtp: bool) -> list[MegatronTensor]:
    """All tensors of the network, in forward order."""
    single = Layout(world=1)
    grouped: dict[tuple[str, str], list[ParameterSlice]] = {}
    for local, fused in zip(
        parameter_slices(model, single, 0, Spec(mtp=mtp)),
        parameter_slices(model, single, 0, Spec(mtp=mtp, fused_norms=True)),
        strict=True,
    ):
        grouped.setdefault((local.megatron_name, fused.megatron_name), []).append(local)
    return [MegatronTensor(*names, tuple(slices)) for names, slices in grouped.items()]


def stacked_home(name: str, model: schema.Model) -> Home:
    """Where megatron-core 0.16.1 puts tensor ``name`` by default: experts are stacked, and so are
    the layers of a dense network."""
    home = Home(name)
    if expert := _EXPERT.fullmatch(name):
        home = Home(f"{expert[1]}.experts.{expert[3]}", (int(expert[2]),))
    if (layer := _LAYER.fullmatch(home.key)) and network.is_dense(model):
        home = Home(f"decoder.layers.{layer[2]}", (int(layer[1]), *home.index))
    return home


def _possible_homes(tensor: MegatronTensor, piece: ParameterSlice) -> Iterator[Home]:
    """Each way in which megatron-core stores what ``piece`` is a part of."""
    half = "_w" if piece.target[0][0] == 0 else "_v"
    for name in dict.fromkeys((tensor.fused, tensor.local)):
        homes = [Home(name)]
        if expert := _EXPERT.fullmatch(name):
            number = int(expert[2])
            homes = [
                Home(f"{expert[1]}.experts.{expert[3]}", (number,)),
                Home(f"{expert[1]}.experts.{number}.{expert[3]}"),
            ]
        for home in homes:
            yield home
            if layer := _LAYER.fullmatch(home.key):
                yield Home(f"decoder.layers.{layer[2]}", (int(layer[1]), *home.index))
            # With "singleton_local_shards", gate and up are tensors of their own.
            yield Home(home.key + half, home.index, alone=True)


def leading_sizes(home: Home, model: schema.Model) -> tuple[int, ...]:
    """The sizes of the dimensions that ``home.index`` counts in."""
    experts = (model.n_routed_experts,) if ".mlp.experts.experts.linear" in home.key else ()
    layers = (model.num_hidden_layers,) * (len(home.index) - len(experts))
    return layers + experts
