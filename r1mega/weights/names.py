"""The only table of parameter names: Hugging Face <-> Megatron, how each is cut, and its shape.

One row per kind of parameter. From it come loading, saving, the stream to the engines, parameter
counts and the tests. Every row maps a rectangle of a Hugging Face tensor to a rectangle of this
rank's Megatron tensor; no other layout change is needed for DeepSeek-V3 (Megatron's MLA takes the
rotary weights interleaved, as Hugging Face stores them). Pure Python: imports no torch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

from r1mega.config import schema
from r1mega.parallel.layout import Layout

Region = tuple[tuple[int, int], ...]  # half-open (start, stop) per dimension
Scope = Literal["first", "last", "layer", "dense", "moe", "expert"]


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of parameter. ``cut`` is the dimension split over tp (etp inside an expert).

    ``part`` (i, n): the i-th of n Hugging Face tensors stacked in one Megatron tensor along dim 0.
    """

    scope: Scope
    hf: str
    megatron: str
    shape: Callable[[schema.Model], tuple[int, ...]]
    cut: int | None = None
    part: tuple[int, int] = (0, 1)


@dataclass(frozen=True, slots=True)
class ParameterSlice:
    """``hf_name[region]`` is ``megatron_name[target]`` of virtual chunk ``chunk`` on some rank."""

    hf_name: str
    hf_shape: tuple[int, ...]
    region: Region
    chunk: int
    megatron_name: str
    target: Region


def _gated(scope: Scope, hf: str, megatron: str, width: Callable[[schema.Model], int]) -> list[Row]:
    """gate, up and down projections: Megatron stacks gate over up in linear_fc1."""
    return [
        Row(
            scope,
            f"{hf}.{name}_proj.weight",
            f"{megatron}.linear_fc1.weight",
            lambda m: (width(m), m.hidden_size),
            cut=0,
            part=(i, 2),
        )
        for i, name in enumerate(("gate", "up"))
    ] + [
        Row(
            scope,
            f"{hf}.down_proj.weight",
            f"{megatron}.linear_fc2.weight",
            lambda m: (m.hidden_size, width(m)),
            cut=1,
        )
    ]


def _query_size(m: schema.Model) -> int:
    return m.num_attention_heads * (m.qk_nope_head_dim + m.qk_rope_head_dim)


_HF = "model.layers.{layer}."
_MG = "decoder.layers.{local_layer}."
_HF_ATTN, _MG_ATTN = _HF + "self_attn.", _MG + "self_attention."


def _query_rows(model: schema.Model) -> list[Row]:
    if model.q_lora_rank is None:
        return [
            Row(
                "layer",
                _HF_ATTN + "q_proj.weight",
                _MG_ATTN + "linear_q_proj.weight",
                lambda m: (_query_size(m), m.hidden_size),
                cut=0,
            )
        ]
    rank = model.q_lora_rank
    return [
        Row(
            "layer",
            _HF_ATTN + "q_a_proj.weight",
            _MG_ATTN + "linear_q_down_proj.weight",
            lambda m: (rank, m.hidden_size),
        ),
        Row(
            "layer",
            _HF_ATTN + "q_a_layernorm.weight",
            _MG_ATTN + "q_layernorm.weight",
            lambda m: (rank,),
        ),
        Row(
            "layer",
            _HF_ATTN + "q_b_proj.weight",
            _MG_ATTN + "linear_q_up_proj.weight",
            lambda m: (_query_size(m), rank),
            cut=0,
        ),
    ]


def rows(model: schema.Model) -> list[Row]:
    """The table for one network, in the order of a forward pass."""
    return [
        Row(
            "first",
            "model.embed_tokens.weight",
            "embedding.word_embeddings.weight",
            lambda m: (m.vocab_size, m.hidden_size),
            cut=0,
        ),
        Row(
            "layer",
            _HF + "input_layernorm.weight",
            _MG + "input_layernorm.weight",
            lambda m: (m.hidden_size,),
        ),
        *_query_rows(model),
        Row(
            "layer",
            _HF_ATTN + "kv_a_proj_with_mqa.weight",
            _MG_ATTN + "linear_kv_down_proj.weight",
            lambda m: (m.kv_lora_rank + m.qk_rope_head_dim, m.hidden_size),
        ),
        Row(
            "layer",
            _HF_ATTN + "kv_a_layernorm.weight",
            _MG_ATTN + "kv_layernorm.weight",
            lambda m: (m.kv_lora_rank,),
        ),
        Row(
            "layer",
            _HF_ATTN + "kv_b_proj.weight",
            _MG_ATTN + "linear_kv_up_proj.weight",
            lambda m: (m.num_attention_heads * (m.qk_nope_head_dim + m.v_head_dim), m.kv_lora_rank),
            cut=0,
        ),
        Row(
            "layer",
            _HF_ATTN + "o_proj.weight",
            _MG_ATTN + "linear_proj.weight",
            lambda m: (m.hidden_size, m.num_attention_heads * m.v_head_dim),
            cut=1,
        ),
        Row(
            "layer",
            _HF + "post_attention_layernorm.weight",
            _MG + "pre_mlp_layernorm.weight",
            lambda m: (m.hidden_size,),
        ),
        *_gated("dense", _HF + "mlp", _MG + "mlp", lambda m: m.intermediate_size),
        Row(
            "moe",
            _HF + "mlp.gate.weight",
            _MG + "mlp.router.weight",
            lambda m: (m.n_routed_experts, m.hidden_size),
        ),
        Row(
            "moe",
            _HF + "mlp.gate.e_score_correction_bias",
            _MG + "mlp.router.expert_bias",
            lambda m: (m.n_routed_experts,),
        ),
        *_gated(
            "moe",
            _HF + "mlp.shared_experts",
            _MG + "mlp.shared_experts",
            lambda m: m.n_shared_experts * m.moe_intermediate_size,
        ),
        *_gated(
            "expert",
            _HF + "mlp.experts.{expert}",
            _MG + "mlp.experts.local_experts.{local_expert}",
            lambda m: m.moe_intermediate_size,
        ),
        Row(
            "last",
            "model.norm.weight",
            "decoder.final_layernorm.weight",
            lambda m: (m.hidden_size,),
        ),
        Row(
            "last",
            "lm_head.weight",
            "output_layer.weight",
            lambda m: (m.vocab_size, m.hidden_size),
            cut=0,
        ),
    ]


def hf_shapes(model: schema.Model) -> dict[str, tuple[int, ...]]:
    """Every Hugging Face tensor and its full shape (MTP layers excepted)."""
    single = Layout(world=1)
    return {s.hf_name: s.hf_shape for s in parameter_slices(model, single, 0)}


def count_parameters(model: schema.Model, *, active: bool = False) -> int:
    """Weights of the network; ``active``: those one token passes through (its experts only)."""
    total = 0
    dense = model.first_k_dense_replace
    experts = model.num_experts_per_tok if active else model.n_routed_experts
    times = {
        "first": 1,
        "last": 1,
        "layer": model.num_hidden_layers,
        "dense": dense,
        "moe": model.num_hidden_layers - dense,
        "expert": (model.num_hidden_layers - dense) * experts,
    }
    for row in rows(model):
        total += times[row.scope] * prod(row.shape(model))
    return total


def parameter_slices(model: schema.Model, layout: Layout, rank: int) -> list[ParameterSlice]:
    """Which rectangle of which Hugging Face tensor ``rank`` holds, in the order of a forward
    pass."""
    place = layout.coordinates(rank)
    table = rows(model)
    slices: list[ParameterSlice] = []
    for chunk, layers in enumerate(layout.stage_layers(model.num_hidden_layers)[place["pp"]]):
        if layers.start == 0:
            slices += _slices(_scoped(table, "first"), model, layout, place, chunk, {})
        for local_layer, layer in enumerate(layers):
            scopes = ("layer", "dense" if layer < model.first_k_dense_replace else "moe")
            at = {"layer": layer, "local_layer": local_layer}
            slices += _slices(_scoped(table, *scopes), model, layout, place, chunk, at)
            if layer >= model.first_k_dense_replace:
                for local_expert, expert in enumerate(_experts(model, layout, place)):
                    at = at | {"expert": expert, "local_expert": local_expert}
                    slices += _slices(_scoped(table, "expert"), model, layout, place, chunk, at)
        if layers.stop == model.num_hidden_layers:
            slices += _slices(_scoped(table, "last"), model, layout, place, chunk, {})
    return slices


def _scoped(table: list[Row], *scopes: str) -> list[Row]:
    return [row for row in table if row.scope in scopes]


def _experts(model: schema.Model, layout: Layout, place: dict[str, int]) -> range:
    size = model.n_routed_experts // layout.ep
    return range(place["ep"] * size, (place["ep"] + 1) * size)


def _slices(
    table: list[Row],
    model: schema.Model,
    layout: Layout,
    place: dict[str, int],
    chunk: int,
    at: dict[str, int],
) -> Iterator[ParameterSlice]:
    for row in table:
        axis = "etp" if row.scope == "expert" else "tp"
        shape = row.shape(model)
        region = _cut(shape, row.cut, place[axis], layout.size(axis))
        sizes = [stop - start for start, stop in region]
        offset = row.part[0] * sizes[0]
        target = ((offset, offset + sizes[0]), *((0, size) for size in sizes[1:]))
        yield ParameterSlice(
            row.hf.format(**at), shape, region, chunk, row.megatron.format(**at), target
        )


def _cut(shape: tuple[int, ...], dim: int | None, index: int, parts: int) -> Region:
    region = [(0, size) for size in shape]
    if dim is not None:
        size = shape[dim] // parts
        region[dim] = (index * size, (index + 1) * size)
    return tuple(region)
