"""Are two folders the same weights, whatever their layouts and formats?

Tensor by tensor and band by band: bit for bit where both store the same dtype, else by the numbers
that are stood for (FP8 codes times their scales).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from r1mega.weights import fp8
from r1mega.weights.blocks import weight_name
from r1mega.weights.inspection import Progress, in_order, values_of
from r1mega.weights.names import Region
from r1mega.weights.readers import Reader
from r1mega.weights.slices import StoredTensor
from r1mega.weights.streams import Band, stored_bands
from r1mega.weights.tensor_file import bytes_of


@dataclass(frozen=True, slots=True)
class Difference:
    """How tensor ``name`` differs: ``what`` says it in words.

    Where numbers were compared, ``largest`` is the largest absolute difference, at index ``where``;
    infinite where only one is finite.
    """

    name: str
    what: str
    largest: float | None = None
    where: tuple[int, ...] | None = None


def common_names(first: Reader, second: Reader, wanted: Callable[[str], bool]) -> list[str]:
    """The ``wanted`` tensors that either has, in order.

    Not the scales of weights that only one of them has as FP8: those are compared as numbers.
    """
    names = dict.fromkeys([*first.tensors, *second.tensors])
    return [name for name in names if wanted(name) and not _is_spent(name, first, second)]


def compare(
    first: Reader,
    second: Reader,
    names: Iterable[str],
    *,
    progress: Progress = lambda _: None,
) -> Iterator[tuple[str, Difference | None]]:
    """(name, what differs) of all ``names`` in order; None: equal bit for bit."""
    return in_order(partial(_compare_tensor, first, second, progress), names)


def _compare_tensor(
    first: Reader, second: Reader, progress: Progress, name: str
) -> tuple[str, Difference | None]:
    mine, other = first.tensors.get(name), second.tensors.get(name)
    if mine is None or other is None:
        holder = first if other is None else second
        return name, Difference(name, f"is only in {holder.folder}")
    if mine.shape != other.shape:
        return name, Difference(name, f"is {list(mine.shape)} against {list(other.shape)}")
    return name, _compare_values(first, second, name, progress)


def _compare_values(
    first: Reader, second: Reader, name: str, progress: Progress
) -> Difference | None:
    mine, other = first.tensors[name], second.tensors[name]
    differs, largest, where = mine.dtype != other.dtype, 0.0, None
    for band in stored_bands(first, name):
        theirs = Band(name, band.region, second.read_stored(name, band.region))
        progress(band.values.nbytes + theirs.values.nbytes)
        if _same_bits(band.values, theirs.values):
            continue
        differs = True
        gap, index = _largest(values_of(first, band), values_of(second, theirs), band.region)
        if where is None or gap > largest:
            largest, where = gap, index
    if not differs:
        return None
    return Difference(name, _in_words(mine, other, largest, where), largest, where)


def _in_words(
    mine: StoredTensor, other: StoredTensor, largest: float, where: tuple[int, ...] | None
) -> str:
    dtypes = "" if mine.dtype == other.dtype else f"is {mine.dtype} against {other.dtype}, "
    if largest == 0.0:
        return f"{dtypes}the same numbers"
    return f"{dtypes}differs by up to {largest:.3g}, at {list(where or ())}"


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and bytes_of(a.contiguous()) == bytes_of(b.contiguous())


def _largest(a: Tensor, b: Tensor, region: Region) -> tuple[float, tuple[int, ...]]:
    """The largest absolute difference, and where in the tensor of which both are ``region``."""
    gaps = (a.double() - b.double()).abs()
    gaps[(a == b) | (a.isnan() & b.isnan())] = 0.0  # infinities, and what is no number in both
    gaps = gaps.nan_to_num(nan=torch.inf)
    flat = int(gaps.argmax())
    at = torch.unravel_index(torch.tensor(flat), gaps.shape) if gaps.dim() else ()
    index = tuple(int(i) + start for i, (start, _) in zip(at, region, strict=True))
    return float(gaps.flatten()[flat]), index


def _is_spent(name: str, first: Reader, second: Reader) -> bool:
    weight = weight_name(name)
    if weight is None:
        return False
    stored = [reader.tensors.get(weight) for reader in (first, second)]
    return sum(tensor is not None and tensor.dtype == fp8.CODES for tensor in stored) == 1
