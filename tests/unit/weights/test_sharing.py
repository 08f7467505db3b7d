"""Sharing out the sending: everything once, and no peak that could have been lower."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from r1mega.weights.sharing import Demand, Stretch, peak_bound, share


def test_the_free_ones_make_up_for_what_one_must_send() -> None:
    only_0 = Demand((0,), (Stretch(1, 30),))
    any_of_3 = Demand((0, 1, 2), (Stretch(20, 2), Stretch(20, 1)))
    bounds, load = share([any_of_3, only_0], 3)
    assert load == [30, 30, 30]
    assert bounds == [(0, 0, 15, 40), (0, 1)]
    assert peak_bound([any_of_3, only_0]) == 30


def test_the_bound_is_of_the_ranks_that_cannot_be_helped() -> None:
    pair = Demand((0, 1), (Stretch(10, 10),))
    assert peak_bound([pair, Demand((2, 3), (Stretch(1, 10),))]) == 50


@st.composite
def meshes(draw: st.DrawFn) -> list[Demand]:
    """Sets of sources as a mesh has them: each rank, those of equal remainder, all of them."""
    stretches = st.lists(
        st.builds(Stretch, st.integers(1, 50), st.integers(1, 9)), min_size=1, max_size=3
    )
    sets = [tuple(range(rest, 8, step)) for step in (1, 2, 8) for rest in range(step)]
    drawn = st.tuples(st.sampled_from(sets), stretches)
    return [Demand(s, tuple(t)) for s, t in draw(st.lists(drawn, min_size=1, max_size=12))]


@given(demands=meshes())
@settings(max_examples=100, deadline=None)
def test_the_peak_is_the_bound_but_for_an_item_per_demand(demands: list[Demand]) -> None:
    bounds, load = share(demands, 8)
    sent = [0] * 8
    for demand, edges in zip(demands, bounds, strict=True):
        sizes = [s.size for s in demand.stretches for _ in range(s.count)]
        assert (edges[0], edges[-1], len(edges)) == (0, len(sizes), len(demand.sources) + 1)
        for source, (start, stop) in zip(demand.sources, pairwise(edges), strict=True):
            assert start <= stop
            sent[source] += sum(sizes[start:stop])
    assert sent == load
    largest = max(s.size for demand in demands for s in demand.stretches)
    assert max(load) <= peak_bound(demands) + largest
    assert max(load) >= peak_bound(demands) * (1 - 1e-12)
