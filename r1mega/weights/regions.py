"""Rectangles of tensors: pure arithmetic, no torch."""

from collections.abc import Iterable
from math import prod

Region = tuple[tuple[int, int], ...]  # half-open (start, stop) per dimension


def whole(shape: Iterable[int]) -> Region:
    return tuple((0, size) for size in shape)


def extent(region: Region) -> list[int]:
    """The shape of what a region cuts out."""
    return [stop - start for start, stop in region]


def volume(region: Region) -> int:
    """How many elements."""
    return prod(stop - start for start, stop in region)


def is_empty(region: Region) -> bool:
    return any(start >= stop for start, stop in region)


def intersect(a: Region, b: Region) -> Region | None:
    """The rectangle two regions of one tensor share, or None."""
    both = tuple((max(a0, b0), min(a1, b1)) for (a0, a1), (b0, b1) in zip(a, b, strict=True))
    return None if is_empty(both) else both


def within(region: Region, outer: Region) -> Region:
    """``region`` counted from the first corner of ``outer``."""
    return tuple(
        (start - origin, stop - origin)
        for (start, stop), (origin, _) in zip(region, outer, strict=True)
    )


def moved(region: Region, origin: Region, target: Region) -> Region:
    """``region`` of the box ``origin``, where that box is ``target``.

    One of the two may have further leading dimensions, of size one.
    """
    extra = len(target) - len(origin)
    inner = within(region, origin)[max(0, -extra) :]
    return target[: max(0, extra)] + tuple(
        (first + start, first + stop)
        for (start, stop), (first, _) in zip(inner, target[max(0, extra) :], strict=True)
    )


def indices(region: Region, outer: Region | None = None) -> tuple[slice, ...]:
    """Index of ``region`` inside the block that holds ``outer``, or else the whole tensor."""
    return tuple(slice(*span) for span in (within(region, outer) if outer else region))


def partition_fault(shape: tuple[int, ...], regions: Iterable[Region]) -> str | None:
    """What keeps ``regions`` from covering ``shape`` exactly once, in words; None: they do.

    Inside, disjoint and of the tensor's volume is enough. Takes n log n for rectangles that are cut
    along the first dimension, n^2 at worst.
    """
    total, covered = prod(shape), 0
    open_: list[Region] = []  # those that may reach beyond the start of the next
    for region in sorted(regions):
        if len(region) != len(shape) or any(
            not 0 <= start <= stop <= size
            for (start, stop), size in zip(region, shape, strict=True)
        ):
            return f"the piece {_words(region)} lies outside its shape {list(shape)}"
        if is_empty(region) and total:
            return f"the piece {_words(region)} is empty"
        open_ = [other for other in open_ if other and other[0][1] > region[0][0]]
        if clash := next((other for other in open_ if intersect(other, region)), None):
            return f"its pieces {_words(clash)} and {_words(region)} overlap"
        if not region and covered:
            return "it is there twice"
        open_.append(region)
        covered += volume(region)
    if covered != total:
        return f"its pieces hold {covered} of its {total} elements"
    return None


def _words(region: Region) -> str:
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in region) + "]"
