"""Tensors as streams of bands: whole rows from the first to the last, in the dtype wanted.

Whoever takes a stream has a few megabytes in hand and can digest every piece on the way, because
a piece gets its rows in order too. What a checkpoint of ours holds is compared with its digests
while it is read.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Literal, Protocol

import torch
import xxhash
from torch import Tensor

from r1mega.weights import fp8
from r1mega.weights.blocks import BLOCK, scale_name, scale_region, scale_shape, weight_name
from r1mega.weights.names import is_float32
from r1mega.weights.readers import Reader
from r1mega.weights.regions import Region, indices, intersect, whole, within
from r1mega.weights.slices import Piece, StoredTensor
from r1mega.weights.tensor_file import DTYPES, bytes_of

BAND_BYTES = 1 << 20  # larger ones are no faster, and four threads have a few each
Precision = Literal["keep", "bf16", "fp8"]


@dataclass(frozen=True, slots=True)
class Band:
    """``values`` are ``name[region]``: rows of a tensor in their full width."""

    name: str
    region: Region
    values: Tensor


class Bands(Protocol):
    """The bands of all tensors that are made of one stored tensor, each tensor's in order."""

    def __call__(self, source: Reader) -> Iterator[Band]: ...


@dataclass(frozen=True, slots=True)
class Recipe:
    """What becomes of the stored tensor ``name``: (dtype, shape) of each tensor made of it."""

    name: str
    makes: Mapping[str, tuple[str, tuple[int, ...]]]
    bands: Bands


class PieceDigests:
    """XXH3-128 of the pieces of a tensor, from its bands in order."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self._states = [(piece, xxhash.xxh3_128()) for piece in pieces]

    def cut(self, band: Band) -> Iterator[tuple[Piece, Region, Tensor]]:
        """(piece, rectangle in it, values) of every piece that ``band`` has a part of."""
        for piece, state in self._states:
            overlap = intersect(piece.region, band.region)
            if overlap is not None:
                part = band.values[indices(overlap, band.region)].contiguous()
                state.update(bytes_of(part))
                yield piece, within(overlap, piece.region), part

    def __iter__(self) -> Iterator[tuple[Piece, str]]:
        return ((piece, state.hexdigest()) for piece, state in self._states)


def recipes(
    stored: Mapping[str, StoredTensor],
    precision: Precision,
    *,
    weights: Collection[str],
    fp8_weights: Collection[str],
) -> list[Recipe]:
    """One for each of ``stored`` that is not spent on another, in its order.

    keep: everything as it is. bf16: ``weights``, the network's own, as a published checkpoint has
    them. fp8: those of them in ``fp8_weights`` as codes and scales besides; codes stay as they are.
    """
    made = []
    for name, tensor in stored.items():
        is_codes = tensor.dtype == fp8.CODES
        weight = stored.get(weight_name(name) or "")
        is_scales = weight is not None and weight.dtype == fp8.CODES
        if precision == "keep" or (precision == "fp8" and (is_codes or is_scales)):
            made.append(_kept(name, tensor))
        elif is_codes:
            made.append(Recipe(name, {name: ("BF16", tensor.shape)}, partial(_dequantized, name)))
        elif is_scales:
            continue
        elif precision == "fp8" and name in fp8_weights:
            scales = (fp8.SCALES, scale_shape(tensor.shape))
            makes = {name: (fp8.CODES, tensor.shape), scale_name(name): scales}
            made.append(Recipe(name, makes, partial(_quantized, name)))
        elif name in weights:
            dtype = published_dtype(name)
            makes = {name: (dtype, tensor.shape)}
            made.append(Recipe(name, makes, partial(_cast, name, DTYPES[dtype])))
        else:
            made.append(_kept(name, tensor))
    return made


def published_dtype(name: str) -> str:
    """Of a weight that is not quantized, in DeepSeek-V3's and other published checkpoints."""
    return "F32" if is_float32(name) else "BF16"


def stored_bands(source: Reader, name: str, *, multiple: int = 1) -> Iterator[Band]:
    """``name`` as it is stored, in bands of a multiple of ``multiple`` rows.

    Raises ValueError behind the last band when a piece is not what its digest says.
    """
    stored = source.tensors[name]
    digests = PieceDigests(piece for piece in stored.pieces if piece.digest)
    for region in row_bands(stored.shape, DTYPES[stored.dtype].itemsize, multiple):
        band = Band(name, region, source.read_stored(name, region))
        for _ in digests.cut(band):
            pass
        yield band
    for piece, digest in digests:
        if digest != piece.digest:
            raise ValueError(
                f"{source.folder / piece.file}: {piece.key} is damaged (its digest is not that of "
                "the index): use another checkpoint"
            )


def row_bands(shape: tuple[int, ...], itemsize: int, multiple: int = 1) -> Iterator[Region]:
    """Bands of BAND_BYTES at most, but of ``multiple`` rows at least."""
    if prod(shape) * itemsize <= BAND_BYTES:
        yield whole(shape)
        return
    rows = BAND_BYTES // (prod(shape[1:]) * itemsize)
    rows = max(multiple, rows // multiple * multiple)
    for start in range(0, shape[0], rows):
        yield ((start, min(start + rows, shape[0])), *whole(shape[1:]))


def _kept(name: str, stored: StoredTensor) -> Recipe:
    return Recipe(name, {name: (stored.dtype, stored.shape)}, partial(stored_bands, name=name))


def _cast(name: str, dtype: torch.dtype, source: Reader) -> Iterator[Band]:
    for band in stored_bands(source, name):
        yield Band(name, band.region, band.values.to(dtype))


def _dequantized(name: str, source: Reader) -> Iterator[Band]:
    scales = torch.cat([b.values for b in stored_bands(source, scale_name(name))])
    for band in stored_bands(source, name):
        rows, _ = scale_region(band.region)
        values = fp8.dequantize(band.values, scales[slice(*rows)], (band.region[0][0], 0))
        yield Band(name, band.region, values.bfloat16())


def _quantized(name: str, source: Reader) -> Iterator[Band]:
    for band in stored_bands(source, name, multiple=BLOCK):
        try:
            codes, scales = fp8.quantize(band.values)
        except ValueError as error:
            raise ValueError(f"{source.folder}: {name}: {error}") from None
        yield Band(name, band.region, codes)
        yield Band(scale_name(name), scale_region(band.region), scales)
