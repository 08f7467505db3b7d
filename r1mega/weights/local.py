"""This rank's parameters seen through the table of names: fill them, read them, stream them."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from r1mega.config import schema
from r1mega.parallel.layout import Layout
from r1mega.weights.holders import Held, holders
from r1mega.weights.names import ParameterSlice, Spec, is_float32, parameter_slices
from r1mega.weights.regions import Region, indices
from r1mega.weights.slices import SliceReader

ReadRegion = Callable[[str, tuple[int, ...], Region], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalWeights:
    """The slices this rank holds and the live tensors they are in (parameters and expert bias)."""

    model: schema.Model
    layout: Layout
    spec: Spec
    rank: int
    slices: tuple[ParameterSlice, ...]
    tensors: tuple[dict[str, Tensor], ...]  # per virtual chunk, by Megatron name
    settle: Callable[[], None] = lambda: None  # ends what an update left under way; collective
    holders: dict[str, Held]  # of every tensor, in forward order

    def blocks(self, piece: ParameterSlice) -> Tensor:
        """The live view [blocks, rows of each, ...] of one slice: writing to it writes the
        parameter."""
        view = self.tensors[piece.chunk][piece.megatron_name].detach()
        return view.unflatten(0, (piece.blocks, -1))[:, *indices(piece.target)]

    def region(self, piece: ParameterSlice) -> Tensor:
        """``hf_name[region]``: a live view of a single block, a copy of several."""
        return self.blocks(piece).flatten(0, 1)

    @torch.no_grad()
    def fill(self, read: ReadRegion) -> None:
        """Set every parameter from its region of the Hugging Face tensor."""
        for piece in self.slices:
            values = read(piece.hf_name, piece.hf_shape, piece.region)
            self.blocks(piece).copy_(values.unflatten(0, (piece.blocks, -1)))

    def copy_to_host(self) -> list[Tensor]:
        """A private host copy of all live tensors, for ``swap``; page-locked beside a GPU."""
        self.settle()
        return [
            torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor.detach())
            for tensor in self._live()
        ]

    def holding(self, host: Sequence[Tensor]) -> "LocalWeights":
        """The same slices, seen in a host copy."""
        left = iter(host)
        return replace(self, tensors=tuple({n: next(left) for n in held} for held in self.tensors))

    @torch.no_grad()
    def swap(self, host: Sequence[Tensor]) -> None:
        """Exchange live weights and host copy in place; a second call puts things back.

        The device holds one further tensor at a time.
        """
        self.settle()
        for tensor, held in zip(self._live(), host, strict=True):
            live = tensor.detach().clone()
            tensor.copy_(held, non_blocking=True)
            held.copy_(live)  # waits, and thereby for the copy above

    def _live(self) -> Iterator[Tensor]:
        return chain.from_iterable(chunk.values() for chunk in self.tensors)


def local_weights(
    model: schema.Model,
    layout: Layout,
    rank: int,
    chunks: Sequence[torch.nn.Module],
    spec: Spec,
) -> LocalWeights:
    """Pair the table's slices with ``chunks``; they must name exactly the same tensors."""
    slices = parameter_slices(model, layout, rank, spec)
    tensors = tuple(_named_tensors(chunk) for chunk in chunks)
    for number, held in enumerate(tensors):
        named = {piece.megatron_name for piece in slices if piece.chunk == number}
        if named != set(held):
            raise RuntimeError(
                f"the table of names and the network differ on rank {rank}: only in the table "
                f"{sorted(named - set(held))[:4]}, only in the network "
                f"{sorted(set(held) - named)[:4]}"
            )
    return LocalWeights(
        model=model,
        layout=layout,
        spec=spec,
        rank=rank,
        slices=tuple(slices),
        tensors=tensors,
        holders=holders(model, layout, spec),
    )


def random_region(seed: int, std: float) -> ReadRegion:
    """Weights drawn per tensor name: the same network under every layout.

    Norms are one, biases zero, the rest normal(0, std).
    """

    def read(name: str, shape: tuple[int, ...], region: Region) -> Tensor:
        if name.endswith("norm.weight"):
            whole = torch.ones(shape)
        elif name.endswith("bias"):
            whole = torch.zeros(shape)
        else:
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
            whole = torch.empty(shape).normal_(0.0, std, generator=generator)
        return whole[indices(region)]

    return read


def initialize(weights: LocalWeights, init: str, *, seed: int) -> None:
    """Fill from ``init``: "random", a Hugging Face folder or a checkpoint folder of ours."""
    if init == "random":
        weights.fill(random_region(seed, weights.model.initializer_range))
        return
    with SliceReader(Path(init)) as reader:
        weights.fill(reader.read)


def _named_tensors(chunk: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent float32 buffers by Megatron name, wrappers' prefixes removed."""
    while isinstance(inner := getattr(chunk, "module", None), torch.nn.Module):
        chunk = inner
    tensors: dict[str, Tensor] = dict(chunk.named_parameters())
    tensors |= {name: b for name, b in chunk.named_buffers() if name.endswith("expert_bias")}
    return tensors


def wire_dtype(name: str, weights: LocalWeights) -> torch.dtype:
    """The expert bias is fp32 whatever the precision; all else has the model's dtype."""
    if is_float32(name):
        return torch.float32
    return next(iter(weights.tensors[0].values())).dtype
