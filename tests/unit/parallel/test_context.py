"""The zigzag cut: every token once, the same work of a causal mask for every rank."""

from itertools import accumulate

import pytest
import torch

from r1mega.parallel.context import padded_lengths, zigzag_rows

LENGTHS = [[5], [1, 9, 2], [16, 3, 3, 8], []]


def starts_of(blocks: list[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(blocks)], dtype=torch.int32)


def test_rows_of_two_sequences_on_two_ranks() -> None:
    starts = starts_of([4, 8])
    assert zigzag_rows(starts, 2, 0).tolist() == [0, 3, 4, 5, 10, 11]
    assert zigzag_rows(starts, 2, 1).tolist() == [1, 2, 6, 7, 8, 9]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("cp", [1, 2, 3, 4])
def test_every_token_is_held_once_and_causal_work_is_equal(lengths: list[int], cp: int) -> None:
    blocks = padded_lengths(lengths, cp=cp, multiple=2)
    starts = starts_of(blocks)
    held = [zigzag_rows(starts, cp, rank) for rank in range(cp)]
    assert sorted(torch.cat(held).tolist()) == list(range(sum(blocks)))
    first_of = starts[:-1].long().repeat_interleave(starts.diff())
    visible = [int((rows - first_of[rows] + 1).sum()) for rows in held]
    assert len(set(visible)) == 1


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("cp", "multiple"), [(1, 1), (1, 3), (2, 1), (2, 4), (3, 2), (4, 3)])
def test_blocks_hold_the_sequences_and_divide(lengths: list[int], cp: int, multiple: int) -> None:
    blocks = padded_lengths(lengths, cp=cp, multiple=multiple)
    cut = 2 * cp if cp > 1 else 1
    assert all(block % cut == 0 for block in blocks)
    pairs = zip(lengths, blocks, strict=False)
    assert all(0 <= block - length < cut for length, block in pairs)
    assert sum(blocks) % (cp * multiple) == 0
    assert sum(blocks) > 0


def test_padding_alone_is_no_longer_than_the_longest_sequence() -> None:
    assert padded_lengths([5, 6], cp=1, multiple=2, least=30) == [5, 6, 6, 6, 6, 1]
    assert padded_lengths([3, 5], cp=2, multiple=1, least=24) == [4, 8, 8, 4]
    assert padded_lengths([5, 6], cp=1, multiple=1, least=11) == [5, 6]
    assert padded_lengths([], cp=2, multiple=3, least=24) == [12, 12]
