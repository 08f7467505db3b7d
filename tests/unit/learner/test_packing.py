"""Packing: every sequence once, budgets kept, every rank the same number of microbatches."""

from hypothesis import given
from hypothesis import strategies as st

from r1mega.learner.packing import pack

lengths = st.lists(st.integers(1, 300), max_size=60)


@given(lengths, st.integers(1, 5), st.integers(50, 500), st.integers(1, 3))
def test_invariants(lengths: list[int], dp: int, budget: int, multiple: int) -> None:
    parts = pack(lengths, dp=dp, tokens_per_microbatch=budget, multiple=multiple)
    assert len(parts) == dp
    assert len(parts[0]) % multiple == 0
    assert len({len(part) for part in parts}) == 1
    assert sorted(i for part in parts for b in part for i in b) == list(range(len(lengths)))
    for part in parts:
        for b in part:
            assert len(b) <= 1 or sum(lengths[i] for i in b) <= budget
    assert parts == pack(lengths, dp=dp, tokens_per_microbatch=budget, multiple=multiple)


@given(st.integers(1, 5))
def test_no_sequences_give_one_empty_microbatch_per_rank(dp: int) -> None:
    assert pack([], dp=dp, tokens_per_microbatch=64) == [[[]]] * dp


def test_long_and_short_are_balanced_over_ranks() -> None:
    parts = pack([100, 10, 90, 20, 80, 30], dp=2, tokens_per_microbatch=200)
    loads = [sum([100, 10, 90, 20, 80, 30][i] for b in part for i in b) for part in parts]
    assert max(loads) - min(loads) <= 10
