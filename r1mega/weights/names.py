"""The only table of parameter names: Hugging Face <-> Megatron, how each is cut, and its shape.

One row per kind of parameter. From it come loading, saving, the stream to the engines, parameter
counts and the tests. Every row maps a rectangle of a Hugging Face tensor to a rectangle of this
rank's Megatron tensor; no other layout change is needed for DeepSeek-V3 (Megatron's MLA takes the
rotary weights interleaved, as Hugging Face stores them). Pure Python: imports no torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

from r1mega.config import schema
from r1mega.parallel.layout import Layout

Region = tuple[tuple[int, int], ...]  # half-open (start, stop) per dimension
Scope = Literal["first", "layer", "dense", "moe", "expert", "last"]


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of parameter, named within its scope's prefix.

    ``shape`` names entries of ``_sizes``. ``cut`` is the dimension split over tp (over etp inside
    an expert). ``part`` (i, n): the i-th of n Hugging Face tensors stacked in one Megatron tensor
    along dim 0. ``fused`` is the name under TransformerEngine's spec, which folds some norms into
    the linear layer behind them. ``q_lora``: only with, or only without, a query LoRA.
    """

    scope: Scope
    hf: str
    megatron: str
    shape: str
    cut: int | None = None
    part: tuple[int, int] = (0, 1)
    fused: str | None = None
    q_lora: bool | None = None


@dataclass(frozen=True, slots=True)
class Spec:
    """Which modules the network is built of, as far as it changes names."""

    fused_norms: bool = False  # TransformerEngine's layer spec
    grouped_experts: bool = False  # TEGroupedMLP: one tensor per expert in one module


@dataclass(frozen=True, slots=True)
class ParameterSlice:
    """``hf_name[region]`` is ``megatron_name[target]`` of virtual chunk ``chunk`` on some rank."""

    hf_name: str
    hf_shape: tuple[int, ...]
    region: Region
    chunk: int
    megatron_name: str
    target: Region


# fmt: off
TABLE = (
    Row("first", "model.embed_tokens.weight", "embedding.word_embeddings.weight",
        "vocab hidden", 0),
    Row("layer", "input_layernorm.weight", "input_layernorm.weight", "hidden"),
    Row("layer", "self_attn.q_proj.weight", "self_attention.linear_q_proj.weight",
        "queries hidden", 0, q_lora=False),
    Row("layer", "self_attn.q_a_proj.weight", "self_attention.linear_q_down_proj.weight",
        "q_rank hidden", q_lora=True),
    Row("layer", "self_attn.q_a_layernorm.weight", "self_attention.q_layernorm.weight",
        "q_rank", fused="self_attention.linear_q_up_proj.layer_norm_weight", q_lora=True),
    Row("layer", "self_attn.q_b_proj.weight", "self_attention.linear_q_up_proj.weight",
        "queries q_rank", 0, q_lora=True),
    Row("layer", "self_attn.kv_a_proj_with_mqa.weight", "self_attention.linear_kv_down_proj.weight",
        "latent hidden"),
    Row("layer", "self_attn.kv_a_layernorm.weight", "self_attention.kv_layernorm.weight",
        "kv_rank", fused="self_attention.linear_kv_up_proj.layer_norm_weight"),
    Row("layer", "self_attn.kv_b_proj.weight", "self_attention.linear_kv_up_proj.weight",
        "keys_values kv_rank", 0),
    Row("layer", "self_attn.o_proj.weight", "self_attention.linear_proj.weight",
        "hidden values", 1),
    Row("dense", "post_attention_layernorm.weight", "pre_mlp_layernorm.weight",
        "hidden", fused="mlp.linear_fc1.layer_norm_weight"),
    Row("dense", "mlp.gate_proj.weight", "mlp.linear_fc1.weight", "dense hidden", 0, (0, 2)),
    Row("dense", "mlp.up_proj.weight", "mlp.linear_fc1.weight", "dense hidden", 0, (1, 2)),
    Row("dense", "mlp.down_proj.weight", "mlp.linear_fc2.weight", "hidden dense", 1),
    Row("moe", "post_attention_layernorm.weight", "pre_mlp_layernorm.weight", "hidden"),
    Row("moe", "mlp.gate.weight", "mlp.router.weight", "experts hidden"),
    Row("moe", "mlp.gate.e_score_correction_bias", "mlp.router.expert_bias", "experts"),
    Row("moe", "mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.linear_fc1.weight",
        "shared hidden", 0, (0, 2)),
    Row("moe", "mlp.shared_experts.up_proj.weight", "mlp.shared_experts.linear_fc1.weight",
        "shared hidden", 0, (1, 2)),
    Row("moe", "mlp.shared_experts.down_proj.weight", "mlp.shared_experts.linear_fc2.weight",
        "hidden shared", 1),
    Row("expert", "gate_proj.weight", "linear_fc1.weight", "expert hidden", 0, (0, 2)),
    Row("expert", "up_proj.weight", "linear_fc1.weight", "expert hidden", 0, (1, 2)),
    Row("expert", "down_proj.weight", "linear_fc2.weight", "hidden expert", 1),
    Row("last", "model.norm.weight", "decoder.final_layernorm.weight", "hidden"),
    Row("last", "lm_head.weight", "output_layer.weight", "vocab hidden", 0),
)
# fmt: on


def _sizes(m: schema.Model) -> dict[str, int]:
    """The names that ``Row.shape`` uses."""
    return {
        "vocab": m.vocab_size,
        "hidden": m.hidden_size,
        "q_rank": m.q_lora_rank or 0,
        "queries": m.num_attention_heads * (m.qk_nope_head_dim + m.qk_rope_head_dim),
        "latent": m.kv_lora_rank + m.qk_rope_head_dim,
        "kv_rank": m.kv_lora_rank,
        "keys_values": m.num_attention_heads * (m.qk_nope_head_dim + m.v_head_dim),
        "values": m.num_attention_heads * m.v_head_dim,
        "dense": m.intermediate_size,
        "experts": m.n_routed_experts,
        "shared": m.n_shared_experts * m.moe_intermediate_size,
        "expert": m.moe_intermediate_size,
    }


def _rows(model: schema.Model) -> list[tuple[Row, tuple[int, ...]]]:
    """The rows that this network has, each with its full Hugging Face shape."""
    sizes = _sizes(model)
    has_q_lora = model.q_lora_rank is not None
    return [
        (row, tuple(sizes[name] for name in row.shape.split()))
        for row in TABLE
        if row.q_lora in (None, has_q_lora)
    ]


def hf_shapes(model: schema.Model) -> dict[str, tuple[int, ...]]:
    """Every Hugging Face tensor and its full shape (MTP layers excepted)."""
    single = Layout(world=1)
    return {s.hf_name: s.hf_shape for s in parameter_slices(model, single, 0)}


def count_parameters(model: schema.Model, *, active: bool = False) -> int:
    """Weights of the network; ``active``: those one token passes through (its experts only)."""
    moe = model.num_hidden_layers - model.first_k_dense_replace
    times = {
        "first": 1,
        "layer": model.num_hidden_layers,
        "dense": model.first_k_dense_replace,
        "moe": moe,
        "expert": moe * (model.num_experts_per_tok if active else model.n_routed_experts),
        "last": 1,
    }
    return sum(times[row.scope] * prod(shape) for row, shape in _rows(model))


def parameter_slices(
    model: schema.Model, layout: Layout, rank: int, spec: Spec = Spec()
) -> list[ParameterSlice]:
    """Which rectangle of which Hugging Face tensor ``rank`` holds, in forward order."""
    place = layout.coordinates(rank)
    rows = _rows(model)
    return [
        _slice(row, shape, at, chunk, place, layout, spec)
        for chunk, scope, at in _places(model, layout, place)
        for row, shape in rows
        if row.scope == scope
    ]


def _places(
    model: schema.Model, layout: Layout, place: dict[str, int]
) -> Iterator[tuple[int, Scope, dict[str, int]]]:
    """(chunk, scope, numbers in names) of all that a rank at ``place`` holds, in forward order."""
    num_experts = model.n_routed_experts // layout.ep
    for chunk, layers in enumerate(layout.stage_layers(model.num_hidden_layers)[place["pp"]]):
        if layers.start == 0:
            yield chunk, "first", {}
        for local_layer, layer in enumerate(layers):
            at = {"layer": layer, "local_layer": local_layer}
            yield chunk, "layer", at
            if layer < model.first_k_dense_replace:
                yield chunk, "dense", at
                continue
            yield chunk, "moe", at
            for local_expert in range(num_experts):
                expert = place["ep"] * num_experts + local_expert
                yield chunk, "expert", at | {"expert": expert, "local_expert": local_expert}
        if layers.stop == model.num_hidden_layers:
            yield chunk, "last", {}


def _slice(
    row: Row,
    shape: tuple[int, ...],
    at: dict[str, int],
    chunk: int,
    place: dict[str, int],
    layout: Layout,
    spec: Spec,
) -> ParameterSlice:
    axis = "etp" if row.scope == "expert" else "tp"
    region = _cut(shape, row.cut, place[axis], layout.size(axis))
    sizes = [stop - start for start, stop in region]
    offset = row.part[0] * sizes[0]
    target = ((offset, offset + sizes[0]), *((0, size) for size in sizes[1:]))
    hf_name = _hf_name(row).format(**at)
    return ParameterSlice(
        hf_name, shape, region, chunk, _megatron_name(row, spec).format(**at), target
    )


def _hf_name(row: Row) -> str:
    if row.scope in ("first", "last"):
        return row.hf
    experts = "mlp.experts.{expert}." if row.scope == "expert" else ""
    return "model.layers.{layer}." + experts + row.hf


def _megatron_name(row: Row, spec: Spec) -> str:
    name = row.fused if row.fused is not None and spec.fused_norms else row.megatron
    if row.scope in ("first", "last"):
        return name
    if row.scope == "expert" and spec.grouped_experts:
        return "decoder.layers.{local_layer}.mlp.experts." + name + "{local_expert}"
    experts = "mlp.experts.local_experts.{local_expert}." if row.scope == "expert" else ""
    return "decoder.layers.{local_layer}." + experts + name


def _cut(shape: tuple[int, ...], dim: int | None, index: int, parts: int) -> Region:
    region = [(0, size) for size in shape]
    if dim is not None:
        size = shape[dim] // parts
        region[dim] = (index * size, (index + 1) * size)
    return tuple(region)
