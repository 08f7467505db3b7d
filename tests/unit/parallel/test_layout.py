"""Layout arithmetic equals Megatron's own rank generator."""

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core.parallel_state import RankGenerator
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from r1mega.parallel.layout import Layout, stage_layers

SIZES = (1, 2, 4)
LAYOUTS = [
    (tp, cp, dp, pp, etp, ep)
    for tp, cp, dp, pp, etp, ep in product(SIZES, (1, 2), SIZES, (1, 2, 3), (1, 2), SIZES)
    if (tp * cp * dp) % (etp * ep) == 0
]


@pytest.mark.parametrize("sizes", LAYOUTS, ids=lambda s: "tp{}cp{}dp{}pp{}etp{}ep{}".format(*s))
def test_groups_equal_megatrons(sizes: tuple[int, ...]) -> None:
    tp, cp, dp, pp, etp, ep = sizes
    layout = Layout(world=tp * cp * dp * pp, tp=tp, cp=cp, pp=pp, etp=etp, ep=ep)
    assert (layout.dp, layout.edp) == (dp, tp * cp * dp // (etp * ep))
    order = "tp-cp-ep-dp-pp"
    dense = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=cp, order=order)
    expert = RankGenerator(tp=etp, ep=ep, dp=layout.edp, pp=pp, cp=1, order=order)
    for axes in ("tp", "cp", "dp", "pp", "tp-pp", "dp-cp", "tp-dp-cp", "tp-cp"):
        assert sorted(layout.groups(*axes.split("-"))) == sorted(dense.get_ranks(axes)), axes
    for mine, theirs in (("etp", "tp"), ("ep", "ep"), ("edp", "dp"), ("etp-ep", "tp-ep")):
        assert sorted(layout.groups(*mine.split("-"))) == sorted(expert.get_ranks(theirs)), mine


def test_coordinates_and_ranks_are_inverse() -> None:
    layout = Layout(world=24, tp=2, cp=2, pp=3, ep=4)
    for rank in range(24):
        place = layout.coordinates(rank)
        assert layout.rank(**{axis: place[axis] for axis in ("tp", "cp", "dp", "pp")}) == rank
        assert layout.rank(**{axis: place[axis] for axis in ("etp", "ep", "edp", "pp")}) == rank


def test_ranks_that_share_experts() -> None:
    assert Layout(world=8, ep=4).expert_peers(5) == [4, 5, 6, 7]
    assert Layout(world=8, tp=2, ep=2, etp=2).expert_peers(3) == [0, 1]
    assert Layout(world=8, tp=2, pp=2, ep=2).expert_peers(6) == [1]  # both are tp ranks of it
    assert Layout(world=8, cp=2, ep=4).expert_peers(0) == [0, 1]


def test_uneven_and_interleaved_stages() -> None:
    uneven = stage_layers(61, 16, first=3, last=2)
    assert [len(chunks[0]) for chunks in uneven] == [3, *[4] * 14, 2]
    assert uneven[-1][0] == range(59, 61)
    assert stage_layers(8, 2, vpp=2) == [
        [range(0, 2), range(4, 6)],
        [range(2, 4), range(6, 8)],
    ]


@pytest.mark.parametrize(
    ("num_layers", "pp", "vpp", "first", "last"),
    [
        (8, 4, None, None, None),
        (8, 2, 2, None, None),
        (8, 3, None, 2, None),
        (7, 3, None, None, 3),
        (61, 16, None, 3, 2),
        (5, 2, None, 1, 4),
        (14, 4, 2, None, 2),
        (12, 3, 2, 4, None),
        (12, 3, 2, 2, 6),
    ],
)
def test_layers_are_where_megatron_builds_them(
    num_layers: int, pp: int, vpp: int | None, first: int | None, last: int | None
) -> None:
    config: Any = SimpleNamespace(
        num_layers=num_layers,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
        pipeline_model_parallel_layout=None,
        account_for_embedding_in_pipeline_split=False,
        account_for_loss_in_pipeline_split=False,
    )
    for pp_rank, chunks in enumerate(stage_layers(num_layers, pp, vpp, first, last)):
        for chunk, layers in enumerate(chunks):
            place = {"vp_stage": chunk if vpp else None, "pp_rank": pp_rank}
            offset = get_transformer_layer_offset(config, **place)
            assert layers == range(offset, offset + get_num_layers_to_build(config, **place))


@pytest.mark.parametrize(
    "sizes", [{"world": 6, "tp": 4}, {"world": 4, "pp": 3}, {"world": 4, "pp": 2, "ep": 4}]
)
def test_sizes_that_do_not_divide_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must divide"):
        Layout(**sizes)


def test_layers_that_do_not_spread_are_refused() -> None:
    with pytest.raises(ValueError, match="61 layers remain for 4 stages"):
        stage_layers(61, 4)


def test_the_ranks_at_some_coordinates_are_those_that_say_so() -> None:
    layout = Layout(world=16, tp=2, pp=2, ep=2, etp=2)
    for place in ({"pp": 1}, {"pp": 0, "tp": 1}, {"pp": 1, "ep": 1}, {"ep": 0, "etp": 1}):
        found = [r for r in range(16) if place.items() <= layout.coordinates(r).items()]
        assert layout.ranks_at(**place) == tuple(found)
