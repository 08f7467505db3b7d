"""Rectangles that cover a tensor exactly once are told from all others."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1mega.weights.regions import Region, partition_fault


@st.composite
def partitions(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Region]]:
    """A shape, cut again and again at random."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    regions: list[Region] = [tuple((0, size) for size in shape)]
    for _ in range(draw(st.integers(0, 6))):
        region = regions.pop(draw(st.integers(0, len(regions) - 1)))
        axis = draw(st.integers(0, len(shape) - 1))
        start, stop = region[axis]
        middle = draw(st.integers(start, stop))
        spans = [(a, b) for a, b in ((start, middle), (middle, stop)) if a < b]
        regions += [(*region[:axis], span, *region[axis + 1 :]) for span in spans]
    return shape, draw(st.permutations(regions))


@given(partitions())
def test_a_partition_has_no_fault(case: tuple[tuple[int, ...], list[Region]]) -> None:
    assert partition_fault(*case) is None


@given(partitions(), st.data())
def test_a_piece_too_many_too_few_or_elsewhere_is_a_fault(
    case: tuple[tuple[int, ...], list[Region]], data: st.DataObject
) -> None:
    shape, regions = case
    index = data.draw(st.integers(0, len(regions) - 1))
    region = regions[index]
    others = regions[:index] + regions[index + 1 :]
    assert "elements" in str(partition_fault(shape, others))
    assert "overlap" in str(partition_fault(shape, [*regions, region]))
    axis = data.draw(st.integers(0, len(shape) - 1))
    (start, stop), step = region[axis], data.draw(st.sampled_from((-1, 1)))
    moved = (*region[:axis], (start + step, stop + step), *region[axis + 1 :])
    assert partition_fault(shape, [*others, moved]) is not None


@pytest.mark.parametrize(
    ("shape", "regions", "words"),
    [
        ((4,), [((0, 5),)], r"\[0:5\] lies outside its shape \[4\]"),
        ((4,), [((0, 2), (0, 1))], "lies outside"),
        ((4,), [((-1, 3),)], "lies outside"),
        ((4,), [((0, 4),), ((2, 2),)], "is empty"),
        ((4,), [((0, 3),)], "hold 3 of its 4 elements"),
        ((4,), [((0, 3),), ((2, 4),)], r"\[0:3\] and \[2:4\] overlap"),
        # As many elements as the shape has, but one twice and one never.
        ((2, 2), [((0, 2), (0, 1)), ((0, 1), (0, 2))], "overlap"),
        ((), [(), ()], "twice"),
        ((), [], "hold 0 of its 1"),
    ],
)
def test_says_which(shape: tuple[int, ...], regions: list[Region], words: str) -> None:
    assert re.search(words, partition_fault(shape, regions) or "")


def test_nothing_to_cover() -> None:
    assert partition_fault((), [()]) is None
    assert partition_fault((0, 4), [((0, 0), (0, 4))]) is None
