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
from r1mega.weights.inspection import in_order, values_of
from r1mega.weights.progress import Advance
from r1mega.weights.readers import Reader
from r1mega.weights.regions import Region
from r1mega.weights.streams import Band, stored_bands
from r1mega.weights.tensor_file import octets


@dataclass(frozen=True, slots=True)
class Difference:
    """How tensor ``name`` differs: ``what`` says it in words.

    Where numbers were compared, ``largest`` is the largest absolute difference, at index ``where``;
    infinite where only one is finite. Entries of the first tensor reach ``reach``.
    """

    name: str
    what: str
    largest: float | None = None
    where: tuple[int, ...] | None = None
    reach: float | None = None

    def __str__(self) -> str:
        return f"{self.name} {self.what}"


def names_of(first: Reader, second: Reader, wanted: Callable[[str], bool]) -> list[str]:
    """The ``wanted`` tensors that either has, in order.

    Not the scales of weights that only one of them has as FP8: those are compared as numbers.
    Raises ValueError when there is none.
    """
    names = dict.fromkeys([*first.tensors, *second.tensors])
    found = [name for name in names if wanted(name) and not _is_spent(name, first, second)]
    if not found:
        raise ValueError("no tensor has such a name: nothing was compared")
    return found


def compare(
    first: Reader,
    second: Reader,
    names: Iterable[str],
    *,
    progress: Advance = lambda _: None,
) -> Iterator[Difference | None]:
    """What differs of each of ``names``, in order; None: equal bit for bit."""
    return in_order(partial(_compare_tensor, first, second, progress), names)


def _compare_tensor(
    first: Reader, second: Reader, progress: Advance, name: str
) -> Difference | None:
    mine, other = first.tensors.get(name), second.tensors.get(name)
    if mine is None or other is None:
        holder = first if other is None else second
        return Difference(name, f"is only in {holder.folder}")
    if mine.shape != other.shape:
        return Difference(name, f"is {list(mine.shape)} against {list(other.shape)}")
    return _compare_values(first, second, name, progress)


def _compare_values(
    first: Reader, second: Reader, name: str, progress: Advance
) -> Difference | None:
    mine, other = first.tensors[name].dtype, second.tensors[name].dtype
    differs, largest, reach = mine != other, 0.0, 0.0
    where: tuple[int, ...] = ()
    for band in stored_bands(first, name):
        theirs = Band(name, band.region, second.read_stored(name, band.region))
        progress(band.values.nbytes + theirs.values.nbytes)
        if not differs and _same_bits(band.values, theirs.values):
            continue
        differs = True
        a, b = values_of(first, band).double(), values_of(second, theirs).double()
        reach = max(reach, float(a.abs().max()))
        gap, index = _largest(a, b, band.region)
        if gap > largest:
            largest, where = gap, index
    if not differs:
        return None
    dtypes = f"is {mine} against {other}, " if mine != other else ""
    what = f"{dtypes}the same numbers"
    if largest:
        what = (
            f"{dtypes}differs by up to {largest:.3g}, at {list(where)}; entries reach {reach:.3g}"
        )
    return Difference(name, what, largest, where, reach)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(octets(a), octets(b))


def _largest(a: Tensor, b: Tensor, region: Region) -> tuple[float, tuple[int, ...]]:
    """The largest absolute difference, and where in the tensor of which both are ``region``."""
    gaps = (a - b).abs()
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
