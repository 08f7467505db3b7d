"""What an engine's parameters look like when it holds the learner's weights.

A parameter is put together from rectangles of Hugging Face tensors, in the dtype that the engine
keeps it in. FP8 weights count as the numbers that their codes and scales stand for, as SGLang's
checksums do.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from r1mega.config.schema import Model
from r1mega.rollout.broadcast import Stream
from r1mega.rollout.checksum import Checksum, cpu_checksum
from r1mega.weights import fp8
from r1mega.weights.blocks import weight_name
from r1mega.weights.engine_names import (
    Axis,
    EngineLayout,
    engine_slices,
    engine_tensors,
    vocabulary_rows,
)
from r1mega.weights.names import is_float32
from r1mega.weights.regions import Region, extent, indices


@dataclass(frozen=True, slots=True)
class Part:
    """``hf_name[region]``, at ``target`` of a parameter."""

    hf_name: str
    region: Region
    target: Region


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Parameter:
    """One tensor in the memory of one rank of an engine; equal to itself only."""

    name: str
    rank: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[Part, ...]
    checksum: Checksum = cpu_checksum

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def engine_parameters(
    model: Model, layout: EngineLayout, rank: int, *, dtype: torch.dtype, checksum: Checksum
) -> tuple[Parameter, ...]:
    """Of a rank of an engine that keeps ``dtype``; the expert bias is float32 in any case.

    Without embedding and head where SGLang pads the vocabulary: nobody sends the padding, so it
    holds what the engine started with.
    """
    parts: dict[str, list[Part]] = defaultdict(list)
    for piece in engine_slices(model, layout, rank):
        if weight_name(piece.hf_name) is None:  # scales are hashed with their weights
            parts[piece.parameter].append(Part(piece.hf_name, piece.region, piece.target))
    shapes = {name: _reach(part.target for part in held) for name, held in parts.items()}
    return tuple(
        Parameter(
            name=name,
            rank=rank,
            shape=shapes[name],
            dtype=torch.float32 if is_float32(name) else dtype,
            parts=tuple(held),
            checksum=checksum,
        )
        for name, held in parts.items()
        if not _is_padded(name, shapes[name], model, layout)
    )


def engine_bytes(model: Model, layout: EngineLayout, itemsize: Callable[[str], int]) -> int:
    """What the ranks of one engine have to receive at least: all that each holds, once."""
    return sum(
        prod(extent(region)) * len(ranks) * itemsize(name)
        for name, tensor in engine_tensors(model, layout).items()
        for region, ranks in tensor.held.parts
    )


def _is_padded(name: str, shape: tuple[int, ...], model: Model, layout: EngineLayout) -> bool:
    axes: dict[str, Axis] = {"model.embed_tokens.weight": "embedding", "lm_head.weight": "head"}
    if name not in axes or not layout.fused:
        return False
    return shape[0] < vocabulary_rows(model.vocab_size, layout.parts(axes[name]))


def _reach(regions: Iterable[Region]) -> tuple[int, ...]:
    """The smallest shape that holds all ``regions``."""
    return tuple(max(stop for _, stop in spans) for spans in zip(*regions, strict=True))


def predicted_checksums(
    parameters: Iterable[Parameter],
    collect: Callable[[Sequence[str]], Stream],
    quantized: Collection[str] = (),
) -> dict[tuple[int, str], str]:
    """By rank and name; nothing on ranks of the learner that ``collect`` gives no tensors.

    ``quantized`` Hugging Face tensors reach the engine in FP8.
    """
    missing = {parameter: len(parameter.parts) for parameter in parameters}
    uses: dict[str, list[tuple[Parameter, Part]]] = defaultdict(list)
    for parameter in missing:
        for part in parameter.parts:
            uses[part.hf_name].append((parameter, part))
    values: dict[Parameter, Tensor] = {}
    found = {}
    for name, tensor in collect(list(uses)):
        if tensor is None:
            continue
        if name in quantized:
            tensor = fp8.dequantize(*fp8.quantize(tensor))
        for parameter, part in uses[name]:
            if parameter not in values:
                values[parameter] = torch.zeros(
                    parameter.shape, dtype=parameter.dtype, device=tensor.device
                )
            values[parameter][indices(part.target)] = tensor[indices(part.region)]
            missing[parameter] -= 1
            if not missing[parameter]:
                key = parameter.rank, parameter.name
                found[key] = parameter.checksum(values.pop(parameter))
    return found
