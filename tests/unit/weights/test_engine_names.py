"""SGLang's names and cuts: written out by hand where they surprise, and covering everything."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1mega.config import schema
from r1mega.weights.engine_names import (
    ENGINE_TABLE,
    EngineLayout,
    EngineSlice,
    engine_slices,
    engine_tensors,
)
from r1mega.weights.names import TABLE, fp8_weights, hf_shapes
from r1mega.weights.regions import Region, extent, partition_fault
from tests.unit.weights.layouts import MODELS, V3, engine_layouts

LLAMA = MODELS["llama"]


def of(
    model: schema.Model, layout: EngineLayout, rank: int, parameter: str
) -> list[tuple[str, Region, Region]]:
    """What lies in a parameter: last two parts of the names, regions, targets."""
    return [
        (".".join(piece.hf_name.split(".")[-2:]), piece.region, piece.target)
        for piece in engine_slices(model, layout, rank)
        if piece.parameter == parameter
    ]


def test_two_ranks_share_a_key_value_head() -> None:
    """4 query heads and 2 key-value heads of 16 on 4 ranks: the third has the second of them."""
    name = "model.layers.1.self_attn.qkv_proj.weight"
    assert of(LLAMA, EngineLayout(tp=4), 2, name) == [
        ("q_proj.weight", ((32, 48), (0, 64)), ((0, 16), (0, 64))),
        ("k_proj.weight", ((16, 32), (0, 64)), ((16, 32), (0, 64))),
        ("v_proj.weight", ((16, 32), (0, 64)), ((32, 48), (0, 64))),
    ]


def test_projections_of_the_latents_are_fused_whole() -> None:
    name = "model.layers.0.self_attn.fused_qkv_a_proj_with_mqa.weight"
    assert of(V3, EngineLayout(tp=2), 1, name) == [
        ("q_a_proj.weight", ((0, 32), (0, 64)), ((0, 32), (0, 64))),
        ("kv_a_proj_with_mqa.weight", ((0, 24), (0, 64)), ((32, 56), (0, 64))),
    ]


def test_experts_are_stacked_on_their_ranks_and_cut_between_neighbours() -> None:
    """tp 4 and ep 2: rank 3 has the second halves of experts 2 and 3."""
    layout, layer = EngineLayout(tp=4, ep=2), "model.layers.1.mlp.experts."
    whole = (0, 64)
    assert of(V3, layout, 3, layer + "w13_weight") == [
        ("gate_proj.weight", ((16, 32), whole), ((0, 1), (0, 16), whole)),
        ("up_proj.weight", ((16, 32), whole), ((0, 1), (16, 32), whole)),
        ("gate_proj.weight", ((16, 32), whole), ((1, 2), (0, 16), whole)),
        ("up_proj.weight", ((16, 32), whole), ((1, 2), (16, 32), whole)),
    ]
    names = [s.hf_name for s in engine_slices(V3, layout, 3) if s.parameter.startswith(layer)]
    assert names[0] == layer + "2.gate_proj.weight"
    assert of(V3, layout, 3, layer + "w2_weight")[1] == (
        "down_proj.weight",
        (whole, (16, 32)),
        ((1, 2), whole, (0, 16)),
    )


def test_the_vocabulary_is_padded_before_it_is_cut() -> None:
    """100 rows are 128 for SGLang: the last of 4 ranks has 4 of them, the last of 8 none."""
    model = schema.Model(vocab_size=100, num_attention_heads=8)
    rows = [of(model, EngineLayout(tp=4), rank, "lm_head.weight")[0][1][0] for rank in range(4)]
    assert rows == [(0, 32), (32, 64), (64, 96), (96, 100)]
    assert of(model, EngineLayout(tp=8), 7, "model.embed_tokens.weight") == []


def test_attention_data_parallelism_leaves_the_rest_on_all_ranks() -> None:
    layout = EngineLayout(tp=4, ep=4, dp=2)
    q_b = [
        of(V3, layout, rank, "model.layers.0.self_attn.q_b_proj.weight")[0][1][0]
        for rank in range(4)
    ]
    assert q_b == [(0, 48), (48, 96), (0, 48), (48, 96)]
    assert of(V3, layout, 3, "model.layers.0.mlp.down_proj.weight")[0][1][1] == (96, 128)
    assert of(V3, layout, 3, "model.embed_tokens.weight")[0][1][0] == (32, 64)
    assert of(V3, layout, 3, "lm_head.weight")[0][1][0] == (48, 64)
    single = EngineLayout(tp=4, dp=4, dense_replicated=True, shared_replicated=True, dp_head=True)
    shapes = hf_shapes(V3)
    for piece in engine_slices(V3, single, 1):
        if "experts." not in piece.hf_name or "shared" in piece.hf_name:
            assert extent(piece.region) == list(shapes[piece.hf_name])


def test_scales_lie_as_their_blocks() -> None:
    model = schema.Model(
        hidden_size=256, q_lora_rank=128, kv_lora_rank=64, moe_intermediate_size=256
    )
    layout = EngineLayout(tp=2, ep=1, dp=2, dense_replicated=True, quantized=True)
    fused = "model.layers.1.self_attn.fused_qkv_a_proj_with_mqa.weight_scale_inv"
    assert of(model, layout, 0, fused) == [
        ("q_a_proj.weight_scale_inv", ((0, 1), (0, 2)), ((0, 1), (0, 2))),
        ("kv_a_proj_with_mqa.weight_scale_inv", ((0, 1), (0, 2)), ((1, 2), (0, 2))),
    ]
    experts = "model.layers.1.mlp.experts.w13_weight_scale_inv"
    assert of(model, layout, 1, experts)[3] == (
        "up_proj.weight_scale_inv",
        ((1, 2), (0, 2)),
        ((1, 2), (1, 2), (0, 2)),
    )
    dtypes = {s.hf_name: s.dtype for s in engine_slices(model, layout, 0)}
    assert {name for name, dtype in dtypes.items() if dtype == "float8_e4m3fn"} == fp8_weights(
        model
    )
    assert dtypes["model.layers.1.mlp.gate.e_score_correction_bias"] == "float32"
    assert dtypes["model.norm.weight"] is None


def test_the_embedded_engine_has_hugging_face_tensors() -> None:
    for model in MODELS.values():
        slices = engine_slices(model, EngineLayout(fused=False), 0)
        assert {s.parameter: tuple(extent(s.target)) for s in slices} == hf_shapes(model)
        assert all(s.parameter == s.hf_name and s.target == s.region for s in slices)


@pytest.mark.parametrize("case", MODELS)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_ranks_together_have_everything_and_parameters_no_overlap(
    case: str, data: st.DataObject
) -> None:
    model = MODELS[case]
    layout = data.draw(engine_layouts(model))
    tensors = engine_tensors(model, layout)
    assert {name: tensor.held.shape for name, tensor in tensors.items()} == hf_shapes(model)
    for tensor in tensors.values():
        assert partition_fault(tensor.held.shape, [r for r, _ in tensor.held.parts]) is None
    for rank in range(layout.tp):
        slices = engine_slices(model, layout, rank)
        held = {
            (name, region, tensor.parameter_of(name), tensor.target(region, region))
            for name, tensor in tensors.items()
            for region, ranks in tensor.held.parts
            if rank in ranks
        }
        assert {(s.hf_name, s.region, s.parameter, s.target) for s in slices} == held
        assert_tiled(slices)


def assert_tiled(slices: list[EngineSlice]) -> None:
    """Every parameter is filled from its first row to its last."""
    targets: dict[str, list[Region]] = {}
    for piece in slices:
        assert extent(piece.target)[-len(piece.region) :] == extent(piece.region)
        targets.setdefault(piece.parameter, []).append(piece.target)
    for regions in targets.values():
        shape = tuple(max(stop for _, stop in spans) for spans in zip(*regions, strict=True))
        assert partition_fault(shape, regions) is None


def test_every_row_that_megatron_cuts_has_its_place_here() -> None:
    """So that a new row of the table is not taken for a replicated one."""
    listed = {(row.scope, member) for row in ENGINE_TABLE for member in row.members}
    cut = {(row.scope, row.hf) for row in TABLE if row.cut is not None}
    assert {(scope, hf) for scope, hf in cut - listed if scope not in ("copy", "mtp")} == set()


@pytest.mark.parametrize(
    ("model", "layout", "sentence"),
    [
        (V3, {"tp": 8}, "tp / dp (8 / 1) must divide the attention heads (4)"),
        (V3, {"tp": 4, "ep": 3}, "ep (3) must divide its tp (4)"),
        (LLAMA, {"tp": 4, "dp": 2}, "its dp (2) and ep (1) must be 1"),
        (V3, {"tp": 2, "fused": False}, "tp 1, not 2"),
        (V3, {"tp": 2, "quantized": True}, "FP8 weights are cut at multiples of 128 only"),
        (schema.Model(intermediate_size=130), {"tp": 4}, "to cut 130 (dense) into 4 equal parts"),
        (
            schema.Model(n_routed_experts=6),
            {"tp": 4, "ep": 4},
            "ep (4) must divide the experts (6)",
        ),
        (
            schema.Model(architecture="llama", num_attention_heads=12, num_key_value_heads=3),
            {"tp": 4},
            "tp (4) must divide the key-value heads (3)",
        ),
    ],
)
def test_what_sglang_cannot_cut_is_said(
    model: schema.Model, layout: dict[str, int], sentence: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        engine_slices(model, EngineLayout(**layout), 0)
