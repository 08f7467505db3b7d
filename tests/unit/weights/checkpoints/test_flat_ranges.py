"""Any flat range of any rank's tensor is found, element by element, in those of another layout."""

from dataclasses import replace
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r1mega.config import schema
from r1mega.parallel.layout import Layout
from r1mega.weights.checkpoints.flat_ranges import places, rectangles, sources, tensors
from r1mega.weights.names import Spec, hf_shapes, parameter_slices
from tests.distributed.tiny import MODEL, MODELS

NETWORKS = [
    *MODELS.values(),
    replace(MODEL, num_nextn_predict_layers=1),
    replace(MODELS["llama"], num_hidden_layers=5, num_key_value_heads=2),
]


@st.composite
def layouts(draw: st.DrawFn, model: schema.Model) -> Layout:
    tp, cp, dp = (
        draw(st.sampled_from([1, 2, 4])),
        draw(st.sampled_from([1, 2])),
        draw(st.integers(1, 4)),
    )
    layers = model.num_hidden_layers
    pp = draw(st.integers(1, 2))
    even = layers % (2 * pp) == 0
    first = draw(st.sampled_from([None, 1])) if pp > 1 else None
    if layers % pp and first is None:
        first = 1
    vpp = draw(st.sampled_from([None, 2])) if pp > 1 and even and first is None else None
    experts = [
        (ep, etp)
        for ep in (1, 2, 4)
        for etp in (1, 2)
        if (tp * cp * dp) % (ep * etp) == 0 and model.architecture == "deepseek_v3"
    ] or [(1, 1)]
    ep, etp = draw(st.sampled_from(experts))
    return Layout(
        world=tp * cp * dp * pp,
        tp=tp,
        cp=cp,
        pp=pp,
        ep=ep,
        etp=etp,
        vpp=vpp,
        layers_in_first_stage=first,
    )


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4)])
def test_rectangles_follow_a_flat_range(shape: tuple[int, ...]) -> None:
    values = torch.arange(prod(shape)).view(shape)
    for start in range(prod(shape) + 1):
        for stop in range(start, prod(shape) + 1):
            cut = [values[tuple(slice(*s) for s in r)] for r in rectangles(shape, start, stop)]
            assert torch.cat([c.flatten() for c in cut] or [values[:0].flatten()]).tolist() == list(
                range(start, stop)
            )
            assert len(cut) <= 2 * len(shape) - 1


def marked(model: schema.Model, spec: Spec) -> dict[str, torch.Tensor]:
    """Every element of every Hugging Face tensor has a number of its own."""
    numbered, begin = {}, 0
    for name, shape in hf_shapes(model, spec).items():
        numbered[name] = torch.arange(begin, begin + prod(shape)).view(shape)
        begin += prod(shape)
    return numbered


def megatron(
    model: schema.Model, layout: Layout, rank: int, spec: Spec, whole: dict[str, torch.Tensor]
) -> dict[tuple[int, str], torch.Tensor]:
    """A rank's flat tensors, filled as weights are."""
    slices = parameter_slices(model, layout, rank, spec)
    filled = {p: torch.full(t.shape, -1) for p, t in tensors(slices).items()}
    for piece in slices:
        values = whole[piece.hf_name][tuple(slice(*span) for span in piece.region)]
        target = tuple(slice(*span) for span in piece.target)
        view = filled[piece.chunk, piece.megatron_name].unflatten(0, (piece.blocks, -1))
        view[:, *target] = values.unflatten(0, (piece.blocks, -1))
    return {parameter: tensor.flatten() for parameter, tensor in filled.items()}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_range_of_one_layout_is_found_in_another(data: st.DataObject) -> None:
    model = data.draw(st.sampled_from(NETWORKS))
    spec = Spec(
        mtp=model.num_nextn_predict_layers > 0,
        fused_norms=data.draw(st.booleans()),
        grouped_experts=data.draw(st.booleans()),
    )
    now, before = data.draw(layouts(model)), data.draw(layouts(model))
    whole = marked(model, spec)
    rank = data.draw(st.integers(0, now.world - 1))
    mine = megatron(model, now, rank, spec, whole)
    assert all((tensor >= 0).all() for tensor in mine.values()), "slices fill every tensor"
    old_spec = replace(spec, fused_norms=data.draw(st.booleans()))
    known = places(model, before, old_spec, whole)
    theirs: dict[int, dict[tuple[int, str], torch.Tensor]] = {}
    shapes = tensors(parameter_slices(model, now, rank, spec))
    for parameter, tensor in shapes.items():
        size = prod(tensor.shape)
        start = data.draw(st.integers(0, size - 1))
        stop = data.draw(st.integers(start + 1, size))
        found = torch.full((stop - start,), -1)
        for place, run in sources(tensor, (start, stop), known):
            assert place.holders
            old_rank, old_parameter = place.holders[-1]
            if old_rank not in theirs:
                theirs[old_rank] = megatron(model, before, old_rank, old_spec, whole)
            values = theirs[old_rank][old_parameter][run.start : run.start + run.length]
            assert (found[run.target : run.target + run.length] == -1).all(), "read twice"
            found[run.target : run.target + run.length] = values
        assert torch.equal(found, mine[parameter][start:stop]), parameter
