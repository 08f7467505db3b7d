"""From a flat range of a Megatron tensor to the flat ranges of another layout's that hold the same.

The optimizer cuts a rank's tensors into flat ranges. Under another layout its tensors are others,
but both are made of rectangles of the same Hugging Face tensors, and the table of names says which.
So a range is cut into rectangles, these are named by the Hugging Face tensor, found in the tensors
of the other layout, and are runs of flat ranges there. Pure arithmetic.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from math import prod

from r1mega.config import schema
from r1mega.parallel.layout import Layout
from r1mega.weights.names import ParameterSlice, Spec, parameter_slices
from r1mega.weights.regions import Region, extent, intersect, moved, volume, whole, within
from r1mega.weights.tensor_file import runs

Parameter = tuple[int, str]  # virtual chunk and Megatron name, on some rank


@dataclass(frozen=True, slots=True)
class Box:
    """Rectangle ``hf`` of a Hugging Face tensor is rectangle ``local`` of a Megatron tensor."""

    hf_name: str
    hf: Region
    local: Region


@dataclass(frozen=True, slots=True)
class Tensor:
    """A Megatron tensor: the boxes that it is made of."""

    shape: tuple[int, ...]
    boxes: tuple[Box, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """``length`` elements from ``start`` of a flat tensor are those from ``target`` of a range."""

    start: int
    target: int
    length: int


@dataclass(frozen=True, slots=True)
class Place:
    """A box of a Megatron tensor of ``shape``, and all who hold it so."""

    shape: tuple[int, ...]
    box: Box
    holders: list[tuple[int, Parameter]] = field(default_factory=list, compare=False)


def tensors(slices: Iterable[ParameterSlice]) -> dict[Parameter, Tensor]:
    """The Megatron tensors that a rank's slices are in."""
    found: dict[Parameter, list[ParameterSlice]] = {}
    for piece in slices:
        found.setdefault((piece.chunk, piece.megatron_name), []).append(piece)
    return {parameter: _tensor(pieces) for parameter, pieces in found.items()}


def places(
    model: schema.Model, layout: Layout, spec: Spec, names: Collection[str]
) -> dict[str, list[Place]]:
    """Where the Hugging Face tensors ``names`` are in the Megatron tensors of all ranks."""
    found: dict[str, dict[tuple[tuple[int, ...], Box], Place]] = {name: {} for name in names}
    for rank in range(layout.world):
        for parameter, tensor in tensors(parameter_slices(model, layout, rank, spec)).items():
            for box in tensor.boxes:
                if (known := found.get(box.hf_name)) is not None:
                    place = known.setdefault((tensor.shape, box), Place(tensor.shape, box))
                    place.holders.append((rank, parameter))
    return {name: list(known.values()) for name, known in found.items()}


def sources(
    tensor: Tensor, span: tuple[int, int], known: dict[str, list[Place]]
) -> Iterator[tuple[Place, Run]]:
    """Where the elements ``span`` of flat ``tensor`` are; targets count from the span's start."""
    target = 0
    for rectangle in rectangles(tensor.shape, *span):
        shape = tuple(extent(rectangle))
        for box in tensor.boxes:
            if (wanted := intersect(rectangle, box.local)) is None:
                continue
            hf = moved(wanted, box.local, box.hf)
            for place in known[box.hf_name]:
                if (shared := intersect(hf, place.box.hf)) is None:
                    continue
                there = moved(shared, place.box.hf, place.box.local)
                here = within(moved(shared, box.hf, box.local), rectangle)
                for start, offset, length in _paired(runs(place.shape, there), runs(shape, here)):
                    yield place, Run(start, target + offset, length)
        target += volume(rectangle)


def rectangles(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Region]:
    """A flat range of a row-major tensor as rectangles, each unbroken, one behind the other."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield ((start, stop),)
        return
    inner = prod(shape[1:])
    (first, skipped), (last, rest) = divmod(start, inner), divmod(stop, inner)
    if first == last:
        yield from _in_row(first, shape, skipped, rest)
        return
    if skipped:
        yield from _in_row(first, shape, skipped, inner)
        first += 1
    if first < last:
        yield ((first, last), *whole(shape[1:]))
    yield from _in_row(last, shape, 0, rest)


def _in_row(row: int, shape: tuple[int, ...], start: int, stop: int) -> Iterator[Region]:
    for rectangle in rectangles(shape[1:], start, stop):
        yield ((row, row + 1), *rectangle)


def _tensor(pieces: list[ParameterSlice]) -> Tensor:
    """Its slices fill it, so its shape is that of all of them together."""
    blocks = pieces[0].blocks
    block = [max(spans) for spans in zip(*([b for _, b in p.target] for p in pieces), strict=True)]
    boxes = []
    for piece in pieces:
        (row, end), *columns = piece.region
        (top, bottom), *inner = piece.target
        size = (end - row) // blocks
        for index in range(blocks):
            hf = (row + index * size, row + (index + 1) * size)
            local = (top + index * block[0], bottom + index * block[0])
            boxes.append(Box(piece.hf_name, (hf, *columns), (local, *inner)))
    return Tensor((blocks * block[0], *block[1:]), tuple(boxes))


def _paired(
    left: Iterator[tuple[int, int]], right: Iterator[tuple[int, int]]
) -> Iterator[tuple[int, int, int]]:
    """Two lists of (start, length) of the same total length, cut where either is."""
    (a, in_a), (b, in_b) = next(left), next(right)
    while True:
        length = min(in_a, in_b)
        yield a, b, length
        a, in_a, b, in_b = a + length, in_a - length, b + length, in_b - length
        if not in_a:
            a, in_a = next(left, (0, 0))
        if not in_b:
            b, in_b = next(right, (0, 0))
        if not in_a or not in_b:
            return
