"""How near the slowest rank comes to the lower bound: this packing against verl's and NeMo-RL's.

Lengths are lognormal with median 6.5k, capped at 32k; work is DeepSeek-V3's per sequence. The
peers' algorithms are written here from their descriptions and given the same costs:

- verl balances ranks by the largest differencing method with equally many sequences per rank, then
  the microbatches of each rank by the same method without that limit.
- NeMo-RL fills microbatches of the token budget by modified first-fit decreasing (Johnson and
  Garey, 1985), splits some until they divide by the ranks, and deals them out round robin.

The lower bound of a rank's work is the largest of: the mean over ranks; the k + 1 smallest of the
k * dp + 1 costliest sequences, of which some rank has to take k + 1, for every k. The pipeline's
time is a simulated 1F1B schedule in which a backward takes twice its forward and every microbatch
pays for IDLE_TOKENS more. One JSON line; means over draws, and the worst draw.
"""

import json
import time
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from itertools import product
from statistics import mean

import numpy as np

from r1mega.learner.packing import IDLE_TOKENS, pack, sequence_cost

CROSSOVER = 29_316  # config.flops.crossover_tokens of DeepSeek-V3
BUDGET = 32_768
DRAWS = 5
Parts = list[list[list[int]]]
Packer = Callable[[list[int], int, int], Parts]  # lengths, dp, pp -> indices per rank, microbatch


def main() -> None:
    packers: dict[str, Packer] = {"r1mega": ours, "verl": verl, "nemo_rl": nemo_rl}
    result: dict[str, object] = {"benchmark": "packing"}
    result |= slowest_rank(packers, per_rank=8) | pipelines(packers, dp=8, pp=8, per_rank=64)
    print(json.dumps(result))


def slowest_rank(packers: dict[str, Packer], *, per_rank: int) -> dict[str, object]:
    """Without a pipeline, on 4 to 64 ranks."""
    ratios: dict[str, list[float]] = {name: [] for name in packers}
    milliseconds: dict[str, float] = {}  # of one core
    for dp, draw in product((4, 8, 16, 32, 64), range(DRAWS)):
        lengths = lengths_of(per_rank * dp, seed=1000 * dp + draw)
        bound = lower_bound([cost(n) for n in lengths], dp)
        for name, packer in packers.items():
            started = time.process_time()
            parts = packer(lengths, dp, 1)
            milliseconds[name] = 1e3 * (time.process_time() - started)  # the last: most sequences
            ratios[name].append(max(sum(loads(lengths, part)) for part in parts) / bound)
    result: dict[str, object] = {"sequences_per_rank": per_rank}
    for name, values in ratios.items():
        result[f"{name}_over_bound"] = round(mean(values), 4)
        result[f"{name}_over_bound_worst"] = round(max(values), 4)
        result[f"{name}_ms_{per_rank * 64}"] = round(milliseconds[name], 1)
    return result


def pipelines(packers: dict[str, Packer], *, dp: int, pp: int, per_rank: int) -> dict[str, object]:
    """Time of the slowest pipeline, the peers' over ours."""
    times: dict[str, list[float]] = {name: [] for name in packers}
    for draw in range(DRAWS):
        lengths = lengths_of(per_rank * dp, seed=draw)
        for name, packer in packers.items():
            parts = packer(lengths, dp, pp)
            times[name].append(max(makespan(loads(lengths, part), pp) for part in parts))
    return {
        f"{name}_pp{pp}_dp{dp}_time_over_r1mega": round(sum(times[name]) / sum(times["r1mega"]), 3)
        for name in ("verl", "nemo_rl")
    }


def lengths_of(count: int, *, seed: int) -> list[int]:
    drawn = np.random.default_rng(seed).lognormal(np.log(6_500), 0.8, count)
    return [min(BUDGET, int(length)) for length in drawn]


def cost(length: int) -> int:
    return sequence_cost(length, CROSSOVER)


def loads(lengths: list[int], part: list[list[int]]) -> list[int]:
    return [sum(cost(lengths[i]) for i in microbatch) for microbatch in part]


def lower_bound(costs: list[int], dp: int) -> float:
    costs = sorted(costs, reverse=True)
    crowded = [sum(costs[k * (dp - 1) : k * dp + 1]) for k in range((len(costs) - 1) // dp + 1)]
    return max(sum(costs) / dp, *crowded)


def makespan(costs: list[int], stages: int) -> float:
    """Of 1F1B: a stage runs its forwards and backwards in a fixed order, each as soon as it may."""
    paid = [(c + IDLE_TOKENS * CROSSOVER) / (3 * stages) for c in costs]
    orders = []
    for stage in range(stages):
        warm = min(stages - 1 - stage, len(paid))
        order = [("forward", i) for i in range(warm)]
        for i in range(len(paid) - warm):
            order += [("forward", warm + i), ("backward", i)]
        orders.append(order + [("backward", i) for i in range(len(paid) - warm, len(paid))])
    done: dict[tuple[str, int, int], float] = {}
    clocks = [0.0] * stages
    while any(orders):
        for stage, order in enumerate(orders):
            while order:
                kind, i = order[0]
                source = stage - 1 if kind == "forward" else stage + 1
                before = (kind, i, source) if 0 <= source < stages else None
                if before is not None and before not in done:
                    break
                start = max(clocks[stage], done[before] if before else 0.0)
                clocks[stage] = start + paid[i] * (1 if kind == "forward" else 2)
                done[kind, i, stage] = clocks[stage]
                order.pop(0)
    return max(clocks)


def ours(lengths: list[int], dp: int, pp: int) -> Parts:
    return pack(
        lengths, dp=dp, pp=pp, tokens_per_microbatch=BUDGET, crossover_tokens=CROSSOVER
    ).parts


def verl(lengths: list[int], dp: int, pp: int) -> Parts:
    ranks = differencing(range(len(lengths)), lengths, dp, equal=True)
    count = max(-(-sum(lengths[i] for i in rank) // BUDGET) for rank in ranks)
    return [differencing(rank, lengths, count, equal=False) for rank in ranks]


def differencing(items: "range | list[int]", lengths: list[int], k: int, *, equal: bool) -> Parts:
    """Largest differencing method (Karmarkar and Karp, 1982) into ``k`` sets.

    ``equal`` starts from tuples of k neighbours in size, so that all sets end with equally many.
    """
    order = sorted(items, key=lambda i: lengths[i])
    width = k if equal else 1
    heap = []
    for number, at in enumerate(range(0, len(order), width)):
        group = [(cost(lengths[i]), [i]) for i in reversed(order[at : at + width])]
        group += [(0, [])] * (k - len(group))
        heap.append((group[-1][0] - group[0][0], number, group))
    heapify(heap)
    while len(heap) > 1:
        (_, number, a), (_, _, b) = heappop(heap), heappop(heap)
        merged = [(x + y, s + t) for (x, s), (y, t) in zip(a, reversed(b), strict=True)]
        merged.sort(key=lambda pair: -pair[0])
        heappush(heap, (merged[-1][0] - merged[0][0], number, merged))
    return [members for _, members in heap[0][2]]


def nemo_rl(lengths: list[int], dp: int, pp: int) -> Parts:
    bins = first_fit_decreasing(lengths)
    while len(bins) % dp:  # split the fullest in number until every rank gets equally many
        crowded = max(bins, key=len)
        bins.append([crowded.pop()])
    return [bins[rank::dp] for rank in range(dp)]


def first_fit_decreasing(lengths: list[int]) -> list[list[int]]:
    """Modified: bins of an item above half the budget are completed before the rest is placed."""
    rest = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    bins = [[rest.pop(0)] for i in list(rest) if lengths[i] > BUDGET / 2]
    for members in bins:
        take(members, rest, lengths, BUDGET / 3, BUDGET / 2)
    for members in reversed([b for b in bins if len(b) == 1]):
        small = [i for i in rest if BUDGET / 6 < lengths[i] <= BUDGET / 3]
        if len(small) > 1 and sum(lengths[i] for i in [*members, *small[-2:]]) <= BUDGET:
            rest.remove(small[-1])
            members.append(small[-1])
            take(members, rest, lengths, BUDGET / 6, BUDGET / 3)
    for members in bins:
        fill(members, rest, lengths)
    while rest:
        bins.append([rest.pop(0)])
        fill(bins[-1], rest, lengths)
    return bins


def fill(members: list[int], rest: list[int], lengths: list[int]) -> None:
    while take(members, rest, lengths, 0, BUDGET):
        pass


def take(members: list[int], rest: list[int], lengths: list[int], low: float, high: float) -> bool:
    """Move the longest of ``rest`` in (low, high] that fits; whether there was one."""
    limit = min(high, BUDGET - sum(lengths[i] for i in members))
    item = next((i for i in rest if low < lengths[i] <= limit), None)
    if item is not None:
        rest.remove(item)
        members.append(item)
    return item is not None


if __name__ == "__main__":
    main()
