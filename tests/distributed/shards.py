"""Learner and engine ranks that are nothing but their share of the weights, for tests of transfers.

Every number is a function of tensor name, seed and place, so that any rank knows what any other has
to hold.
"""

import zlib

import torch
from torch import Tensor

from r1mega.config.schema import Model
from r1mega.parallel.layout import Layout
from r1mega.weights.blocks import scale_name, weight_name
from r1mega.weights.checkpoints.flat_ranges import tensors
from r1mega.weights.engine_names import EngineLayout, engine_slices
from r1mega.weights.fp8 import quantize
from r1mega.weights.holders import holders
from r1mega.weights.local import LocalWeights, ReadRegion
from r1mega.weights.names import Spec, hf_shapes, is_float32, parameter_slices
from r1mega.weights.regions import Region, indices


def whole(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """A Hugging Face tensor."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
    return torch.randn(shape, generator=generator)


def learner_shard(
    model: Model, layout: Layout, rank: int, *, seed: int, dtype: torch.dtype = torch.float32
) -> LocalWeights:
    """What a learner rank holds of ``whole`` tensors."""
    return filled_shard(
        model, layout, rank, lambda name, shape, at: whole(name, shape, seed)[indices(at)], dtype
    )


def filled_shard(
    model: Model,
    layout: Layout,
    rank: int,
    read: ReadRegion,
    dtype: torch.dtype = torch.float32,
) -> LocalWeights:
    """What a learner rank holds of what ``read`` gives, without a network around it."""
    slices = tuple(parameter_slices(model, layout, rank))
    held: list[dict[str, Tensor]] = [{} for _ in range(layout.vpp or 1)]
    for (chunk, name), tensor in tensors(slices).items():
        kept = torch.float32 if name.endswith("expert_bias") else dtype
        held[chunk][name] = torch.empty(tensor.shape, dtype=kept)
    weights = LocalWeights(
        model=model,
        layout=layout,
        spec=Spec(),
        rank=rank,
        slices=slices,
        tensors=tuple(held),
        holders=holders(model, layout),
    )
    weights.fill(read)
    return weights


def engine_shard(
    model: Model,
    layout: EngineLayout,
    rank: int,
    *,
    seed: int | None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """What an engine rank has to hold, cut from the whole tensors; without a seed, all zero."""
    slices = engine_slices(model, layout, rank)
    names = {held.hf_name for held in slices}
    shard: dict[str, Tensor] = {}
    for held in slices:
        values = _values(held.hf_name, held.hf_shape, names, model, seed or 0, dtype)
        if held.parameter not in shard:
            extents = [
                max(s.target[dim][1] for s in slices if s.parameter == held.parameter)
                for dim in range(len(held.target))
            ]
            shard[held.parameter] = torch.zeros(extents, dtype=values.dtype)
        if seed is not None:
            place = shard[held.parameter][indices(held.target)]
            place.copy_(cut(values, held.region).view(place.shape))
    return shard


def _values(
    name: str, shape: tuple[int, ...], names: set[str], model: Model, seed: int, dtype: torch.dtype
) -> Tensor:
    """A whole tensor as engines are to hold it."""
    if (weight := weight_name(name)) is not None:
        return quantize(whole(weight, hf_shapes(model)[weight], seed).to(dtype))[1]
    values = whole(name, shape, seed)
    if scale_name(name) in names:
        return quantize(values.to(dtype))[0]
    return values if is_float32(name) else values.to(dtype)


def cut(values: Tensor, region: Region) -> Tensor:
    return values[indices(region)]
