"""Packing: every sequence once, budgets kept, ranks and pipelines balanced near the lower bound."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1mega.learner.packing import Partition, pack, sequence_cost

CROSSOVER = 30_000  # DeepSeek-V3's
lengths = st.lists(st.integers(1, 300), max_size=60)


def costs(lengths: list[int], packing: Partition) -> list[list[int]]:
    """Of every rank's microbatches."""
    return [
        [sum(sequence_cost(lengths[i], CROSSOVER) for i in b) for b in part]
        for part in packing.parts
    ]


@given(
    lengths,
    st.integers(1, 5),
    st.integers(50, 500),
    st.sampled_from([(1, None), (2, None), (4, None), (2, 2), (3, 2)]),
    st.sampled_from([1, 100, CROSSOVER]),
)
def test_invariants(
    lengths: list[int], dp: int, budget: int, stages: tuple[int, int | None], crossover: int
) -> None:
    pp, vpp = stages

    def packed() -> Partition:
        return pack(
            lengths,
            dp=dp,
            tokens_per_microbatch=budget,
            crossover_tokens=crossover,
            pp=pp,
            vpp=vpp,
        )

    packing = packed()
    count = len(packing.parts[0])
    assert [len(part) for part in packing.parts] == [count] * dp
    assert count >= 1
    assert vpp is None or count % pp == 0
    microbatches = [b for part in packing.parts for b in part]
    assert sorted(i for b in microbatches for i in b) == list(range(len(lengths)))
    assert all(len(b) <= 1 or sum(lengths[i] for i in b) <= budget for b in microbatches)
    assert len(lengths) < dp * count or all(microbatches)
    assert packing == packed()


@given(st.integers(1, 5))
def test_no_sequences_give_one_empty_microbatch_per_rank(dp: int) -> None:
    packing = pack([], dp=dp, tokens_per_microbatch=64, crossover_tokens=CROSSOVER)
    assert packing.parts == [[[]]] * dp


def test_one_long_sequence_weighs_as_much_as_its_attention() -> None:
    # 30,000 tokens cost as much as 60,000 in pieces so short that attention is nothing.
    lengths = [30_000] + [100] * 600
    packing = pack(lengths, dp=2, tokens_per_microbatch=100_000, crossover_tokens=CROSSOVER)
    tokens = [sum(lengths[i] for b in part for i in b) for part in packing.parts]
    assert tokens == pytest.approx([30_000, 60_000], rel=0.01)
    assert packing.balance == pytest.approx(1.0, abs=0.01)


def test_a_sequence_above_the_budget_travels_alone() -> None:
    packing = pack([100, 10, 10, 10], dp=1, tokens_per_microbatch=30, crossover_tokens=CROSSOVER)
    assert packing.parts == [[[1, 2, 3], [0]]]


def test_a_pipeline_fills_and_drains_with_cheap_microbatches() -> None:
    # One sequence of 60 sets the costliest microbatch: the others are filled up to it.
    lengths = [60] + [20] * 8
    packing = pack(lengths, dp=1, tokens_per_microbatch=60, crossover_tokens=10**9, pp=4)
    assert [sum(lengths[i] for i in b) for b in packing.parts[0]] == [40, 60, 60, 60]


def test_more_microbatches_only_where_a_pipeline_waits() -> None:
    lengths = [4_000] * 64

    def count(pp: int, vpp: int | None = None) -> int:
        packing = pack(
            lengths,
            dp=1,
            tokens_per_microbatch=32_000,
            crossover_tokens=CROSSOVER,
            pp=pp,
            vpp=vpp,
        )
        return len(packing.parts[0])

    # 1F1B wastes (pp - 1) microbatches: with 16 stages and 8 of them two thirds of the time.
    assert count(1) == 8
    assert count(16) == 64
    assert 8 < count(4, vpp=2) < count(4) <= 64
    assert count(4, vpp=2) % 4 == 0


@pytest.mark.parametrize("dp", [4, 8, 16, 32, 64])
@pytest.mark.parametrize("pp", [1, 8])
def test_slowest_rank_is_near_the_lower_bound(dp: int, pp: int) -> None:
    """Eight sequences per rank, lognormal with median 6.5k, capped at 32k."""
    generator = np.random.default_rng(dp)
    for _ in range(5):
        drawn = generator.lognormal(np.log(6_500), 0.8, 8 * dp)
        lengths = [min(32_768, int(length)) for length in drawn]
        packing = pack(
            lengths, dp=dp, tokens_per_microbatch=32_768, crossover_tokens=CROSSOVER, pp=pp
        )
        table = costs(lengths, packing)
        mean = sum(map(sum, table)) / dp
        largest = max(sequence_cost(length, CROSSOVER) for length in lengths)
        bound = mean + (pp - 1) * max(largest, mean / len(table[0]))
        assert max(sum(row) + (pp - 1) * max(row) for row in table) <= 1.02 * bound
        assert packing.balance == max(map(sum, table)) / mean
