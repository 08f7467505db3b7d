"""Sequences to microbatches: pure arithmetic on lengths.

Invariants (asserted by the tests): every sequence lands in exactly one microbatch; no microbatch
exceeds the token budget unless it holds a single sequence; every data-parallel rank gets the same
number of microbatches, none of them empty when there are enough sequences.
"""

from math import ceil


def pack(
    lengths: list[int], *, dp: int, tokens_per_microbatch: int, multiple: int = 1
) -> list[list[list[int]]]:
    """Indices of sequences per microbatch: ``pack(...)[dp_rank][microbatch]``.

    Each rank gets a multiple of ``multiple`` microbatches (the interleaved schedule wants pp).
    The number of microbatches is the smallest allowed one into which longest-first placement
    on the emptiest microbatch fits the budget; ties go by index, so the result is deterministic.
    """
    if not lengths:
        return [[[]] * multiple for _ in range(dp)]  # one empty microbatch: all ranks take part
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    step = dp * multiple
    count = step * max(1, ceil(sum(lengths) / (tokens_per_microbatch * step)))
    while not _fits(bins := _spread(order, lengths, count), lengths, tokens_per_microbatch):
        count += step
    bins.sort(key=lambda b: (-sum(lengths[i] for i in b), b))
    return [[sorted(b) for b in bins[rank::dp]] for rank in range(dp)]


def _fits(bins: list[list[int]], lengths: list[int], budget: int) -> bool:
    return all(len(b) <= 1 or sum(lengths[i] for i in b) <= budget for b in bins)


def _spread(order: list[int], lengths: list[int], count: int) -> list[list[int]]:
    bins: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for i in order:
        emptiest = min(range(count), key=lambda b: (loads[b], b))
        bins[emptiest].append(i)
        loads[emptiest] += lengths[i]
    return bins
