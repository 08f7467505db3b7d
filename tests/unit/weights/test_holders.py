"""Who holds what, computed per axis, is what every rank's own table says."""

from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1mega.parallel.layout import Layout
from r1mega.weights.blocks import own_scale_region, scale_region
from r1mega.weights.holders import Held, balanced_owners, holders, ranks_for
from r1mega.weights.names import Spec, fp8_weights, hf_shapes, parameter_slices
from r1mega.weights.regions import Region, is_empty, partition_fault, volume
from tests.unit.weights.layouts import MODELS, V3, learners, spec_of


@pytest.mark.parametrize("case", MODELS)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_they_are_those_that_say_so_themselves(case: str, data: st.DataObject) -> None:
    model, spec = MODELS[case], spec_of(MODELS[case])
    layout = data.draw(learners(model))
    ranks: dict[str, dict[Region, set[int]]] = {name: {} for name in hf_shapes(model, spec)}
    for rank in range(layout.world):
        for piece in parameter_slices(model, layout, rank, spec):
            ranks[piece.hf_name].setdefault(piece.region, set()).add(rank)
    found = holders(model, layout, spec)
    assert list(found) == list(ranks)
    for name, held in found.items():
        assert dict(held.parts) == {region: tuple(sorted(r)) for region, r in ranks[name].items()}
        assert partition_fault(held.shape, [region for region, _ in held.parts]) is None


def test_tensors_that_lie_alike_are_one_object() -> None:
    found = holders(V3, Layout(world=4, pp=2, ep=2))
    experts = [found[f"model.layers.1.mlp.experts.{i}.gate_proj.weight"] for i in range(4)]
    assert experts[0] is experts[1] is not experts[2] is experts[3]
    assert found["model.layers.1.mlp.experts.0.up_proj.weight"] is experts[0]


def test_scales_go_with_the_first_row_of_their_block() -> None:
    """Rows 0:96 and 96:192 of a weight: block 1, which begins at 128, is the second rank's."""
    assert own_scale_region(((0, 96), (0, 64))) == ((0, 1), (0, 1))
    assert own_scale_region(((96, 192), (0, 64))) == ((1, 2), (0, 1))
    assert is_empty(own_scale_region(((32, 64), (0, 64))))
    assert scale_region(((96, 192), (0, 64))) == ((0, 2), (0, 1))
    quantized = fp8_weights(V3)
    found = holders(V3, Layout(world=4, tp=4), quantized=quantized)
    names = list(found)
    for name in quantized:
        scales = found[name + "_scale_inv"]
        assert names[names.index(name) + 1] == name + "_scale_inv"
        assert scales.shape == tuple(-(-size // 128) for size in found[name].shape)
        assert sum(volume(region) for region, _ in scales.parts) == prod(scales.shape)


def test_mtp_copies_are_cut_as_what_they_copy() -> None:
    model, layout = MODELS["v3 with mtp"], Layout(world=4, tp=2, pp=2)
    found = holders(model, layout, Spec(mtp=True, mtp_copies=True))
    assert found.keys() - holders(model, layout, Spec(mtp=True)).keys() == {
        f"model.layers.{layer}.{copy}.weight"
        for layer in (4, 5)
        for copy in ("embed_tokens", "shared_head.head")
    }
    assert found["model.layers.4.embed_tokens.weight"].parts == (
        (((0, 32), (0, 64)), (2,)),
        (((32, 64), (0, 64)), (3,)),
    )


def test_owners_are_replicas_and_their_loads_even() -> None:
    """What one rank alone holds is taken into account: 2 owns it, so 1 gets the rest."""
    region = ((0, 8),)
    held = {
        "alone": Held((8,), ((region, (2,)),)),
        "a": Held((8,), ((region, (1, 2)),)),
        "b": Held((8,), ((region, (1, 2, 3)),)),
    }
    assert balanced_owners(held, lambda _, r: volume(r)) == {"alone": (2,), "a": (1,), "b": (3,)}


def test_the_smallest_world_has_no_replicas() -> None:
    assert ranks_for() == 1
    assert ranks_for(tp=4, ep=2) == 4
    assert ranks_for(tp=2, pp=3, ep=4, etp=2) == 24
    layout = Layout(world=ranks_for(tp=4, pp=2, ep=8), tp=4, pp=2, ep=8)
    assert layout.edp == 1
