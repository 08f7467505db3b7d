"""Sequences to microbatches, so that the slowest rank is as fast as can be: integer arithmetic.

With p stages the microbatches of a rank take sum(cost) + (p - 1) * max(cost) under 1F1B (v virtual
chunks divide the second term by v: Megatron-LM, arXiv 2104.04473, section 2.2), and a step takes as
long as its slowest rank. So sequences are spread over ranks first and over the microbatches of each
rank then, both times by the same placement: longest first onto the least loaded, then exchanges
with the most loaded until none helps. A pipeline is filled and drained with cheap microbatches.

Invariants (asserted by the tests): every sequence lands in exactly one microbatch; no microbatch
exceeds the token budget unless it holds a single sequence; every data-parallel rank gets the same
number of microbatches, a multiple of pp when interleaved, none of them empty when there are enough
sequences. Costs are integers and ties go by index: all ranks find the same answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
# A pass over fewer tokens waits for weights, not for arithmetic: an H100 reads a bf16 weight in the
# time of 300 multiplications, and a mixture spreads its tokens thinner.
IDLE_TOKENS = 512
_NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True, kw_only=True, slots=True)
class Partition:
    """Indices of sequences: ``parts[dp_rank][microbatch]``."""

    parts: list[list[list[int]]]
    balance: float  # cost of the most loaded rank over the mean: 1 is perfect, 1.1 wastes a tenth


def sequence_cost(length: int, crossover_tokens: int) -> int:
    """Work of one sequence; a microbatch costs the sum, since packing mixes no sequences.

    ``crossover_tokens`` is the length at which causal attention costs as much as all the rest
    (config.flops); the unit is the rest of one token divided by it.
    """
    return length * (crossover_tokens + length)


def pack(
    lengths: Sequence[int],
    *,
    dp: int,
    tokens_per_microbatch: int,
    crossover_tokens: int,
    pp: int = 1,
    vpp: int | None = None,
) -> Partition:
    """Spread sequences of ``lengths`` tokens over ``dp`` ranks and their microbatches."""
    costs = np.array([sequence_cost(n, crossover_tokens) for n in lengths], dtype=np.int64)
    # A sequence beyond the budget fills a microbatch alone.
    sizes = np.array([min(n, tokens_per_microbatch) for n in lengths], dtype=np.int64)
    step = pp if vpp else 1
    least = step * max(1, -(-int(sizes.sum()) // (dp * tokens_per_microbatch * step)))
    count = _best_count(
        costs,
        range(least, max(least, len(costs) // dp) + 1, step),
        dp=dp,
        bubble=(pp - 1) / (vpp or 1),
        overhead=IDLE_TOKENS * crossover_tokens,
    )
    budget, pipelined = tokens_per_microbatch, pp > 1
    while (parts := _place(costs, sizes, dp, count, budget, pipelined=pipelined)) is None:
        count += step
    loads = [sum(int(costs[b].sum()) for b in part) for part in parts]
    return Partition(parts=parts, balance=max(loads) * dp / max(1, sum(loads)))


def _best_count(costs: Integers, counts: range, *, dp: int, bubble: float, overhead: int) -> int:
    """Microbatches per rank: more of them shrink the pipeline's bubble, each has a price."""
    mean, largest = int(costs.sum()) / dp, int(costs.max(initial=0))
    return min(counts, key=lambda m: bubble * max(mean / m, largest) + m * overhead)


def _place(
    costs: Integers, sizes: Integers, dp: int, count: int, budget: int, *, pipelined: bool
) -> list[list[list[int]]] | None:
    """``count`` microbatches for each of ``dp`` ranks, or None when the budget is too tight.

    The cheapest stand at both ends, where a pipeline fills and drains; ranks that share experts
    meet in microbatches of similar cost.
    """
    at_least = count if len(costs) >= dp * count else 0
    ranks = spread(costs, sizes, dp, capacity=count * budget, at_least=at_least)
    if ranks is None:
        return None
    parts = []
    for rank in ranks:
        bins = spread(costs[rank], sizes[rank], count, capacity=budget)
        if bins is None:
            return None
        if pipelined:
            bins = _fill_up(costs[rank], sizes[rank], bins, budget)
        bins = sorted(bins, key=lambda b: int(costs[rank[b]].sum()))
        parts.append([rank[b].tolist() for b in bins[::2] + bins[1::2][::-1]])
    return parts


def _fill_up(costs: Integers, sizes: Integers, bins: list[Integers], budget: int) -> list[Integers]:
    """The same items in as many bins, none costlier than before, but some cheaper.

    What makes some microbatch costly is often one sequence. Bins filled up to its cost leave cheap
    ones over, with which a pipeline fills and drains.
    """
    ceiling = max(int(costs[b].sum()) for b in bins)
    at_least = min(1, *(len(b) for b in bins))
    bin_of = _longest_first(costs, sizes, len(bins), budget, at_least, ceiling)
    if bin_of is None:
        return bins
    return [np.flatnonzero(bin_of == number) for number in range(len(bins))]


def spread(
    costs: Integers, sizes: Integers, bins: int, *, capacity: int, at_least: int = 0
) -> list[Integers] | None:
    """Items of every bin, the costliest bin as cheap as found; None when the items do not fit.

    No bin holds more than ``capacity`` of ``sizes``, none fewer than ``at_least`` items. Each
    exchange lowers the costliest bin or leaves fewer of its cost, so the search ends by itself.
    """
    bin_of = _longest_first(costs, sizes, bins, capacity, at_least)
    if bin_of is None:
        return None
    # An empty place per bin makes moving an item an exchange like any other.
    costs, sizes = (np.concatenate([a, np.zeros(bins, dtype=np.int64)]) for a in (costs, sizes))
    places = np.concatenate([bin_of, np.arange(bins)])
    for _ in range(len(costs)):
        exchange = _best_exchange(costs, sizes, places, capacity, at_least)
        if exchange is None:
            break
        item, other = exchange
        places[item], places[other] = places[other], places[item]
        places[len(bin_of) :] = np.arange(bins)
    return [np.flatnonzero(places[: len(bin_of)] == number) for number in range(bins)]


def _longest_first(
    costs: Integers,
    sizes: Integers,
    bins: int,
    capacity: int,
    at_least: int,
    ceiling: int | None = None,
) -> Integers | None:
    """Bin of every item: the cheapest there is, or the costliest it leaves within ``ceiling``."""
    bin_of = np.zeros(len(costs), dtype=np.int64)
    loads, fill, held = (np.zeros(bins, dtype=np.int64) for _ in range(3))
    for placed, item in enumerate(np.argsort(-costs, kind="stable")):
        usable = fill + sizes[item] <= capacity
        if ceiling is not None:
            usable &= loads + costs[item] <= ceiling
        missing = np.maximum(at_least - held, 0)
        if missing.sum() == len(costs) - placed:
            usable &= missing > 0
        if not usable.any():
            return None
        wanted = loads if ceiling is None else -loads
        chosen = bin_of[item] = np.where(usable, wanted, _NEVER).argmin()
        loads[chosen] += costs[item]
        fill[chosen] += sizes[item]
        held[chosen] += 1
    return bin_of


def _best_exchange(
    costs: Integers, sizes: Integers, places: Integers, capacity: int, at_least: int
) -> tuple[int, int] | None:
    """The item of the costliest bin and the one elsewhere (or empty place) that relieve it most."""
    loads, fill = (np.zeros(int(places.max()) + 1, dtype=np.int64) for _ in range(2))
    np.add.at(loads, places, costs)
    np.add.at(fill, places, sizes)
    worst = int(loads.argmax())
    mine, others = np.flatnonzero((places == worst) & (costs > 0)), np.flatnonzero(places != worst)
    if len(mine) <= at_least:  # it may swap, not give away
        others = others[costs[others] > 0]
    relief = costs[mine, None] - costs[others]
    larger = np.maximum(loads[worst] - relief, loads[places[others]] + relief)
    added = sizes[others] - sizes[mine, None]
    fits = (fill[worst] + added <= capacity) & (fill[places[others]] - added <= capacity)
    better = fits & (larger < loads[worst])
    if not better.any():
        return None
    best = int(np.where(better, larger, _NEVER).argmin())
    return int(mine[best // len(others)]), int(others[best % len(others)])
