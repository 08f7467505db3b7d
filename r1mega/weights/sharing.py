"""Share out sending evenly: integers in, integers out, nothing else known.

A flow is a row of items, in stretches of equally many bytes, that any of its sources could send.
Each source gets one unbroken run of them, as many bytes as bring the least loaded sources up to one
common level. Flows are served from those with fewest sources to those with most, and from large
items to small: where the sets of sources are nested or disjoint, as those of a mesh are when its
axes divide each other, the loads reach the lower bound but for the size of an item.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, slots=True)
class Stretch:
    """``count`` items of ``size`` bytes each."""

    count: int
    size: int


@dataclass(frozen=True, slots=True)
class Demand:
    """What to send, and the ranks that could."""

    sources: tuple[int, ...]
    stretches: tuple[Stretch, ...]


def share(demands: Sequence[Demand], world: int) -> tuple[list[tuple[int, ...]], list[int]]:
    """Bounds of each demand: its i-th source sends items ``bounds[i]`` to ``bounds[i + 1]``; and
    the bytes that each rank of ``world`` sends in all."""
    load = [0] * world
    bounds: list[tuple[int, ...]] = [()] * len(demands)
    order = sorted(
        range(len(demands)),
        key=lambda i: (len(demands[i].sources), -max(s.size for s in demands[i].stretches)),
    )
    for i in order:
        bounds[i] = _serve(demands[i], load)
    return bounds, load


def peak_bound(demands: Iterable[Demand]) -> float:
    """No sharing has a lower peak: ranks that alone could send something have to send it, one of
    them at least the average."""
    totals: dict[frozenset[int], int] = {}
    for demand in demands:
        sources = frozenset(demand.sources)
        size = sum(stretch.count * stretch.size for stretch in demand.stretches)
        totals[sources] = totals.get(sources, 0) + size
    return max(
        sum(size for inner, size in totals.items() if inner <= sources) / len(sources)
        for sources in totals
    )


def _serve(demand: Demand, load: list[int]) -> tuple[int, ...]:
    """Adds to ``load``."""
    items = [0, *accumulate(stretch.count for stretch in demand.stretches)]
    sizes = [0, *accumulate(stretch.count * stretch.size for stretch in demand.stretches)]
    quotas = _level([load[source] for source in demand.sources], sizes[-1])
    bounds, sent = [0], [0]
    for reach in accumulate(quotas):
        at = min(bisect_right(sizes, reach), len(demand.stretches)) - 1
        more = round((reach - sizes[at]) / demand.stretches[at].size)
        bounds.append(items[at] + more)
        sent.append(sizes[at] + more * demand.stretches[at].size)
    for source, before, after in zip(demand.sources, sent, sent[1:], strict=False):
        load[source] += after - before
    return (*bounds[:-1], items[-1])


def _level(load: Sequence[int], total: int) -> list[float]:
    """How much each gets so that ``total`` ends at one level, or above it without getting any."""
    below = 0
    level = 0.0
    for count, lowest in enumerate(sorted(load), start=1):
        if count > 1 and level <= lowest:
            break
        below += lowest
        level = (total + below) / count
    return [max(0.0, level - at) for at in load]
