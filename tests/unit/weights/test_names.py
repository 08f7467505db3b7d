"""The table of names: complete, disjoint, and right for the 671B network."""

import json
import os
from math import prod
from pathlib import Path

import pytest

from r1mega.config import schema
from r1mega.model.hf_config import model_from_hf
from r1mega.parallel.layout import Layout
from r1mega.weights.names import Spec, count_parameters, hf_shapes, parameter_slices
from r1mega.weights.regions import Region

DATA = Path(os.environ.get("R1MEGA_DATA", Path(__file__).parents[4] / "shared" / "data"))
TINY = schema.Model()
LAYOUTS = [
    Layout(world=1),
    Layout(world=4, tp=2, pp=2, ep=2),
    Layout(world=8, tp=2, pp=2, ep=4),
    Layout(world=8, tp=2, ep=2, etp=2),
    Layout(world=4, pp=2, layers_in_first_stage=1),
    Layout(world=2, pp=2, vpp=2),
]


LLAMA = schema.Model(architecture="llama", num_attention_heads=8, num_key_value_heads=2)
QWEN2 = schema.Model(architecture="qwen2", num_key_value_heads=2, tie_word_embeddings=True)
MTP = schema.Model(num_nextn_predict_layers=2, q_lora_rank=None)
CASES = {
    **{f"moe {layout}": (TINY, layout, Spec()) for layout in LAYOUTS},
    "llama": (LLAMA, Layout(world=1), Spec()),
    "llama tp2": (LLAMA, Layout(world=2, tp=2), Spec()),
    "llama with more ranks than key-value heads": (LLAMA, Layout(world=4, tp=4), Spec()),
    "llama with heads in parts": (LLAMA, Layout(world=8, tp=8), Spec()),
    "qwen2 tied": (QWEN2, Layout(world=1), Spec()),
    "qwen2 tied pp2 tp2": (QWEN2, Layout(world=8, tp=2, pp=2), Spec()),
    "mtp": (MTP, Layout(world=1), Spec(mtp=True)),
    "mtp pp2 ep2": (MTP, Layout(world=8, tp=2, pp=2, ep=2), Spec(mtp=True)),
}


def covered(regions: set[Region], shape: tuple[int, ...]) -> bool:
    """Whether disjoint regions tile the whole shape: distinct ones of equal cut do."""
    return sum(prod(b - a for a, b in region) for region in regions) == prod(shape)


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_covered_exactly_once_per_replica(case: str) -> None:
    model, layout, spec = CASES[case]
    regions: dict[str, set[Region]] = {}
    for rank in range(layout.world):
        targets: set[tuple[int, str, Region]] = set()
        for piece in parameter_slices(model, layout, rank, spec):
            regions.setdefault(piece.hf_name, set()).add(piece.region)
            target = (piece.chunk, piece.megatron_name, piece.target)
            assert target not in targets
            targets.add(target)
            rows = [stop - start for start, stop in piece.target]
            assert [piece.blocks * rows[0], *rows[1:]] == [b - a for a, b in piece.region]
    shapes = hf_shapes(model, spec)
    assert regions.keys() == shapes.keys()
    assert all(covered(regions[name], shape) for name, shape in shapes.items())


def test_query_key_value_are_interleaved_per_group() -> None:
    """As megatron-core 0.16.1's SelfAttention reads them: q1 q2 q3 q4 k1 v1 | q5 ... v2."""

    def places(tp: int, rank: int) -> list[tuple[str, tuple[int, int], int, tuple[int, int]]]:
        return [
            (piece.hf_name.split(".")[-2], piece.region[0], piece.blocks, piece.target[0])
            for piece in parameter_slices(LLAMA, Layout(world=tp, tp=tp), rank)
            if piece.megatron_name == "decoder.layers.0.self_attention.linear_qkv.weight"
        ]

    whole, heads = [(0, 64), (0, 16), (0, 16)], ["q_proj", "k_proj", "v_proj"]
    targets = [(0, 32), (32, 40), (40, 48)]
    assert places(1, 0) == list(zip(heads, whole, [2, 2, 2], targets, strict=True))
    second = [(32, 64), (8, 16), (8, 16)]
    assert places(2, 1) == list(zip(heads, second, [1, 1, 1], targets, strict=True))
    assert places(4, 2) == [("q_proj", (32, 56), 1, (0, 24))]
    assert places(4, 3) == [
        ("q_proj", (56, 64), 1, (0, 8)),
        ("k_proj", (8, 16), 1, (8, 16)),
        ("v_proj", (8, 16), 1, (16, 24)),
    ]


def test_transformer_engine_folds_the_norms_of_a_dense_layer() -> None:
    spec = Spec(fused_norms=True)
    names = {s.hf_name: s.megatron_name for s in parameter_slices(LLAMA, Layout(world=1), 0, spec)}
    layer, block = "model.layers.3.", "decoder.layers.3."
    folded = block + "self_attention.linear_qkv.layer_norm_weight"
    assert names[layer + "input_layernorm.weight"] == folded
    folded = block + "mlp.linear_fc1.layer_norm_weight"
    assert names[layer + "post_attention_layernorm.weight"] == folded


def test_a_last_stage_holds_a_copy_of_a_tied_embedding() -> None:
    names = [
        [(p.hf_name, p.megatron_name) for p in parameter_slices(QWEN2, Layout(world=2, pp=2), rank)]
        for rank in (0, 1)
    ]
    assert names[0][0] == ("model.embed_tokens.weight", "embedding.word_embeddings.weight")
    assert names[1][-1] == ("model.embed_tokens.weight", "output_layer.weight")
    assert all("output_layer.weight" not in megatron for _, megatron in names[0])


def test_mtp_layers_are_named_as_published() -> None:
    names = {
        p.hf_name: p.megatron_name
        for p in parameter_slices(MTP, Layout(world=2, pp=2), 1, Spec(mtp=True))
        if "model.layers.5." in p.hf_name and ".experts." not in p.hf_name
    }
    block, layer = "mtp.layers.1.", "model.layers.5."
    assert names[layer + "eh_proj.weight"] == block + "eh_proj.weight"
    assert names[layer + "enorm.weight"] == block + "enorm.weight"
    assert names[layer + "hnorm.weight"] == block + "hnorm.weight"
    assert names[layer + "shared_head.norm.weight"] == block + "final_layernorm.weight"
    assert names[layer + "mlp.gate.weight"] == block + "transformer_layer.mlp.router.weight"
    attention = block + "transformer_layer.self_attention."
    assert names[layer + "self_attn.q_proj.weight"] == attention + "linear_q_proj.weight"
    assert hf_shapes(MTP, Spec(mtp=True)).keys() > hf_shapes(MTP).keys()


@pytest.mark.skipif(not DATA.exists(), reason=f"needs DeepSeek-V3's shapes under {DATA}")
def test_the_671b_network_has_transformers_names_and_shapes() -> None:
    folder = DATA / "deepseek_v3"
    values = json.loads((folder / "hf_config_deepseek_v3_671B.json").read_text())
    model = model_from_hf(values)
    shapes = hf_shapes(model)
    theirs = json.loads((folder / "transformers_dsv3_meta_shapes.json").read_text())
    for name, shape in theirs.items():
        if name.endswith("experts.gate_up_proj"):  # transformers fuses experts in memory
            stem = name.removesuffix("gate_up_proj")
            assert shapes[stem + "0.gate_proj.weight"] == (shape[1] // 2, shape[2])
            assert shapes[stem + f"{shape[0] - 1}.up_proj.weight"] == (shape[1] // 2, shape[2])
        elif name.endswith("experts.down_proj"):
            assert shapes[name.removesuffix("down_proj") + "0.down_proj.weight"] == tuple(shape[1:])
        else:
            assert shapes[name] == tuple(shape)
    assert count_parameters(model) == sum(prod(shape) for shape in theirs.values())
    assert count_parameters(model) == 671_026_419_200 == sum(map(prod, shapes.values()))


def test_transformer_engine_folds_norms_and_groups_experts() -> None:
    """Names of megatron-core 0.16.1's TE spec for MLA and of TEGroupedMLP, by its source."""
    spec = Spec(fused_norms=True, grouped_experts=True)
    layout = Layout(world=2, ep=2)
    names = {s.hf_name: s.megatron_name for s in parameter_slices(TINY, layout, 1, spec)}
    layer, attention = "model.layers.1.", "decoder.layers.1.self_attention."
    expected = {
        layer + "input_layernorm.weight": "decoder.layers.1.input_layernorm.weight",
        layer + "self_attn.q_a_layernorm.weight": attention + "linear_q_up_proj.layer_norm_weight",
        layer + "self_attn.kv_a_layernorm.weight": attention
        + "linear_kv_up_proj.layer_norm_weight",
        layer + "post_attention_layernorm.weight": "decoder.layers.1.pre_mlp_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight": (
            "decoder.layers.0.mlp.linear_fc1.layer_norm_weight"
        ),
        layer + "mlp.experts.5.up_proj.weight": "decoder.layers.1.mlp.experts.linear_fc1.weight1",
        layer + "mlp.experts.5.down_proj.weight": "decoder.layers.1.mlp.experts.linear_fc2.weight1",
    }
    assert {name: names[name] for name in expected} == expected
    assert names.keys() == {s.hf_name for s in parameter_slices(TINY, layout, 1)}
