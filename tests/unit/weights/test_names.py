"""The table of names: complete, disjoint, and right for the 671B network."""

import json
import os
from math import prod
from pathlib import Path

import pytest

from r1mega.config import schema
from r1mega.model.hf_config import model_from_hf
from r1mega.parallel.layout import Layout
from r1mega.weights.names import Region, Spec, count_parameters, hf_shapes, parameter_slices

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


def covered(regions: set[Region], shape: tuple[int, ...]) -> bool:
    """Whether disjoint regions tile the whole shape: distinct ones of equal cut do."""
    return sum(prod(b - a for a, b in region) for region in regions) == prod(shape)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_tensor_is_covered_exactly_once_per_replica(layout: Layout) -> None:
    regions: dict[str, set[Region]] = {}
    for rank in range(layout.world):
        targets: set[tuple[int, str, Region]] = set()
        for piece in parameter_slices(TINY, layout, rank):
            regions.setdefault(piece.hf_name, set()).add(piece.region)
            target = (piece.chunk, piece.megatron_name, piece.target)
            assert target not in targets
            targets.add(target)
    shapes = hf_shapes(TINY)
    assert regions.keys() == shapes.keys()
    assert all(covered(regions[name], shape) for name, shape in shapes.items())


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
