"""The only table of parameter names: Hugging Face <-> Megatron, how each is cut, and its shape.

One row per kind of parameter. From it come loading, saving, the stream to the engines, parameter
counts and the tests. Every row maps a rectangle of a Hugging Face tensor to the same rectangle of
each of some equal blocks of this rank's Megatron tensor; no other layout change is needed
(Megatron's MLA takes the rotary weights interleaved, its other attention in halves, both as Hugging
Face stores them). Pure Python: imports no torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

from r1mega.config import network, schema
from r1mega.parallel.layout import Layout

Region = tuple[tuple[int, int], ...]  # half-open (start, stop) per dimension
# "copy": on a last stage that is not the first. "mtp": an MTP layer, beside its transformer layer.
Scope = Literal["first", "layer", "dense", "moe", "expert", "last", "copy", "mtp"]
Feature = Literal["mla", "q_lora", "q_full", "gqa", "qkv_bias", "o_bias", "head", "tied", "mtp"]


@dataclass(frozen=True, slots=True)
class Stacked:
    """One of several Hugging Face tensors that Megatron stacks along dim 0 of one tensor.

    ``rows`` are the sizes of all of them in order, this one at ``index``. The stack repeats:
    ``groups`` names how often in the whole tensor; without it, once on every rank.
    """

    index: int
    rows: tuple[str, ...]
    groups: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of parameter, named within its scope's prefix.

    ``shape`` names entries of ``_sizes``. ``cut`` is the dimension split over tp (over etp inside
    an expert). ``fused`` is the name under TransformerEngine's spec, which folds some norms into
    the linear layer behind them. ``only``: the feature without which a network has no such row.
    """

    scope: Scope
    hf: str
    megatron: str
    shape: str
    cut: int | None = None
    stacked: Stacked | None = None
    fused: str | None = None
    only: Feature | None = None


@dataclass(frozen=True, slots=True)
class Spec:
    """Which modules the network is built of, as far as it changes names."""

    fused_norms: bool = False  # TransformerEngine's layer spec
    grouped_experts: bool = False  # TEGroupedMLP: one tensor per expert in one module
    mtp: bool = False  # the MTP layers, on the last stage


@dataclass(frozen=True, slots=True)
class ParameterSlice:
    """``hf_name[region]`` on some rank: dim 0 of ``megatron_name`` is ``blocks`` equal blocks, and
    the region, cut into as many, lies at ``target`` in each. ``chunk`` is the virtual stage."""

    hf_name: str
    hf_shape: tuple[int, ...]
    region: Region
    chunk: int
    megatron_name: str
    blocks: int
    target: Region


def _stack(*rows: str, groups: str | None = None) -> tuple[Stacked, ...]:
    return tuple(Stacked(index, rows, groups) for index in range(len(rows)))


Q, K, V = _stack("queries", "keys", "keys", groups="key_value_heads")
GATE, UP = _stack("dense", "dense")
SHARED_GATE, SHARED_UP = _stack("shared", "shared")
EXPERT_GATE, EXPERT_UP = _stack("expert", "expert")

# fmt: off
TABLE = (
    Row("first", "model.embed_tokens.weight", "embedding.word_embeddings.weight",
        "vocab hidden", 0),
    Row("layer", "input_layernorm.weight", "input_layernorm.weight", "hidden", only="mla"),
    Row("layer", "input_layernorm.weight", "input_layernorm.weight", "hidden", only="gqa",
        fused="self_attention.linear_qkv.layer_norm_weight"),
    Row("layer", "self_attn.q_proj.weight", "self_attention.linear_qkv.weight",
        "queries hidden", 0, Q, only="gqa"),
    Row("layer", "self_attn.k_proj.weight", "self_attention.linear_qkv.weight",
        "keys hidden", 0, K, only="gqa"),
    Row("layer", "self_attn.v_proj.weight", "self_attention.linear_qkv.weight",
        "keys hidden", 0, V, only="gqa"),
    Row("layer", "self_attn.q_proj.bias", "self_attention.linear_qkv.bias",
        "queries", 0, Q, only="qkv_bias"),
    Row("layer", "self_attn.k_proj.bias", "self_attention.linear_qkv.bias",
        "keys", 0, K, only="qkv_bias"),
    Row("layer", "self_attn.v_proj.bias", "self_attention.linear_qkv.bias",
        "keys", 0, V, only="qkv_bias"),
    Row("layer", "self_attn.q_proj.weight", "self_attention.linear_q_proj.weight",
        "queries hidden", 0, only="q_full"),
    Row("layer", "self_attn.q_a_proj.weight", "self_attention.linear_q_down_proj.weight",
        "q_rank hidden", only="q_lora"),
    Row("layer", "self_attn.q_a_layernorm.weight", "self_attention.q_layernorm.weight",
        "q_rank", fused="self_attention.linear_q_up_proj.layer_norm_weight", only="q_lora"),
    Row("layer", "self_attn.q_b_proj.weight", "self_attention.linear_q_up_proj.weight",
        "queries q_rank", 0, only="q_lora"),
    Row("layer", "self_attn.kv_a_proj_with_mqa.weight", "self_attention.linear_kv_down_proj.weight",
        "latent hidden", only="mla"),
    Row("layer", "self_attn.kv_a_layernorm.weight", "self_attention.kv_layernorm.weight",
        "kv_rank", fused="self_attention.linear_kv_up_proj.layer_norm_weight", only="mla"),
    Row("layer", "self_attn.kv_b_proj.weight", "self_attention.linear_kv_up_proj.weight",
        "keys_values kv_rank", 0, only="mla"),
    Row("layer", "self_attn.o_proj.weight", "self_attention.linear_proj.weight",
        "hidden values", 1),
    Row("layer", "self_attn.o_proj.bias", "self_attention.linear_proj.bias",
        "hidden", only="o_bias"),
    Row("dense", "post_attention_layernorm.weight", "pre_mlp_layernorm.weight",
        "hidden", fused="mlp.linear_fc1.layer_norm_weight"),
    Row("dense", "mlp.gate_proj.weight", "mlp.linear_fc1.weight", "dense hidden", 0, GATE),
    Row("dense", "mlp.up_proj.weight", "mlp.linear_fc1.weight", "dense hidden", 0, UP),
    Row("dense", "mlp.down_proj.weight", "mlp.linear_fc2.weight", "hidden dense", 1),
    Row("moe", "post_attention_layernorm.weight", "pre_mlp_layernorm.weight", "hidden"),
    Row("moe", "mlp.gate.weight", "mlp.router.weight", "experts hidden"),
    Row("moe", "mlp.gate.e_score_correction_bias", "mlp.router.expert_bias", "experts"),
    Row("moe", "mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.linear_fc1.weight",
        "shared hidden", 0, SHARED_GATE),
    Row("moe", "mlp.shared_experts.up_proj.weight", "mlp.shared_experts.linear_fc1.weight",
        "shared hidden", 0, SHARED_UP),
    Row("moe", "mlp.shared_experts.down_proj.weight", "mlp.shared_experts.linear_fc2.weight",
        "hidden shared", 1),
    Row("expert", "gate_proj.weight", "linear_fc1.weight", "expert hidden", 0, EXPERT_GATE),
    Row("expert", "up_proj.weight", "linear_fc1.weight", "expert hidden", 0, EXPERT_UP),
    Row("expert", "down_proj.weight", "linear_fc2.weight", "hidden expert", 1),
    Row("last", "model.norm.weight", "decoder.final_layernorm.weight", "hidden"),
    Row("last", "lm_head.weight", "output_layer.weight", "vocab hidden", 0, only="head"),
    # A tied head and MTP layers need the embedding where they are.
    Row("copy", "model.embed_tokens.weight", "output_layer.weight", "vocab hidden", 0, only="tied"),
    Row("copy", "model.embed_tokens.weight", "embedding.word_embeddings.weight",
        "vocab hidden", 0, only="mtp"),
    # Published MTP layers also hold copies of embedding and head; the main ones serve both.
    Row("mtp", "enorm.weight", "enorm.weight", "hidden"),
    Row("mtp", "hnorm.weight", "hnorm.weight", "hidden"),
    Row("mtp", "eh_proj.weight", "eh_proj.weight", "hidden twice_hidden", 0),
    Row("mtp", "shared_head.norm.weight", "final_layernorm.weight", "hidden"),
)
# fmt: on


def _sizes(m: schema.Model) -> dict[str, int]:
    """The names that ``Row.shape`` uses."""
    heads, groups = m.num_attention_heads, network.key_value_heads(m)
    if network.is_dense(m):
        query = value = network.head_dim(m)
    else:
        query, value = m.qk_nope_head_dim + m.qk_rope_head_dim, m.v_head_dim
    return {
        "vocab": m.vocab_size,
        "hidden": m.hidden_size,
        "twice_hidden": 2 * m.hidden_size,
        "queries": heads * query,
        "values": heads * value,
        "key_value_heads": groups,
        "keys": groups * query,
        "q_rank": m.q_lora_rank or 0,
        "latent": m.kv_lora_rank + m.qk_rope_head_dim,
        "kv_rank": m.kv_lora_rank,
        "keys_values": heads * (m.qk_nope_head_dim + m.v_head_dim),
        "dense": m.intermediate_size,
        "experts": m.n_routed_experts,
        "shared": m.n_shared_experts * m.moe_intermediate_size,
        "expert": m.moe_intermediate_size,
    }


def _features(m: schema.Model, spec: Spec) -> set[Feature]:
    dense = network.is_dense(m)
    has: dict[Feature, bool] = {
        "mla": not dense,
        "q_lora": not dense and m.q_lora_rank is not None,
        "q_full": not dense and m.q_lora_rank is None,
        "gqa": dense,
        "qkv_bias": network.has_query_key_value_bias(m),
        "o_bias": network.has_attention_output_bias(m),
        "head": not m.tie_word_embeddings,
        "tied": m.tie_word_embeddings,
        "mtp": spec.mtp,
    }
    return {feature for feature, present in has.items() if present}


def hf_shapes(model: schema.Model, spec: Spec = Spec()) -> dict[str, tuple[int, ...]]:
    """Every Hugging Face tensor and its full shape; those of MTP layers if ``spec`` builds them."""
    single = Layout(world=1)
    return {s.hf_name: s.hf_shape for s in parameter_slices(model, single, 0, spec)}


def count_parameters(model: schema.Model, *, active: bool = False) -> int:
    """Weights of the network without MTP layers; a tied head counts once.

    ``active``: those one token passes through (its experts only).
    """
    dense = network.num_dense_layers(model)
    moe = model.num_hidden_layers - dense
    times: dict[Scope, int] = {
        "first": 1,
        "layer": model.num_hidden_layers,
        "dense": dense,
        "moe": moe,
        "expert": moe * (model.num_experts_per_tok if active else model.n_routed_experts),
        "last": 1,
    }
    sizes, features = _sizes(model), _features(model, Spec())
    return sum(
        times.get(row.scope, 0) * prod(sizes[name] for name in row.shape.split())
        for row in TABLE
        if row.only is None or row.only in features
    )


def parameter_slices(
    model: schema.Model, layout: Layout, rank: int, spec: Spec = Spec()
) -> list[ParameterSlice]:
    """Which rectangle of which Hugging Face tensor ``rank`` holds, in forward order."""
    place = layout.coordinates(rank)
    sizes, features = _sizes(model), _features(model, spec)
    rows = [row for row in TABLE if row.only is None or row.only in features]
    return [
        piece
        for chunk, scope, at in _places(model, layout, place, spec)
        for row in rows
        if row.scope == scope
        if (piece := _slice(row, sizes, at, chunk, place, layout, spec)) is not None
    ]


_At = dict[str, int | str]  # what fills the braces in a row's names


def _places(
    model: schema.Model, layout: Layout, place: dict[str, int], spec: Spec
) -> Iterator[tuple[int, Scope, _At]]:
    """(chunk, scope, numbers in names) of all that a rank at ``place`` holds, in forward order."""
    num_layers = model.num_hidden_layers
    for chunk, layers in enumerate(layout.stage_layers(num_layers)[place["pp"]]):
        if is_first := layers.start == 0:
            yield chunk, "first", {}
        for local_layer, layer in enumerate(layers):
            for scope, at in _layer(model, layout, place, layer, f"decoder.layers.{local_layer}."):
                yield chunk, scope, at
        if layers.stop != num_layers:
            continue
        yield chunk, "last", {}
        if not is_first:
            yield chunk, "copy", {}
        for depth in range(model.num_nextn_predict_layers if spec.mtp else 0):
            layer, block = num_layers + depth, f"mtp.layers.{depth}."
            yield chunk, "mtp", {"layer": layer, "block": block}
            for scope, at in _layer(model, layout, place, layer, block + "transformer_layer."):
                yield chunk, scope, at


def _layer(
    model: schema.Model, layout: Layout, place: dict[str, int], layer: int, block: str
) -> Iterator[tuple[Scope, _At]]:
    """One transformer layer, which Megatron's names begin with ``block`` for."""
    at: _At = {"layer": layer, "block": block}
    yield "layer", at
    if layer < network.num_dense_layers(model):
        yield "dense", at
        return
    yield "moe", at
    num_experts = model.n_routed_experts // layout.ep
    for local_expert in range(num_experts):
        expert = place["ep"] * num_experts + local_expert
        yield "expert", at | {"expert": expert, "local_expert": local_expert}


def _slice(
    row: Row,
    sizes: dict[str, int],
    at: _At,
    chunk: int,
    place: dict[str, int],
    layout: Layout,
    spec: Spec,
) -> ParameterSlice | None:
    """None: this rank holds nothing of the tensor."""
    shape = tuple(sizes[name] for name in row.shape.split())
    region, target, blocks = [(0, size) for size in shape], [(0, size) for size in shape], 1
    if row.cut is not None:
        axis = "etp" if row.scope == "expert" else "tp"
        stacked = row.stacked or Stacked(0, (row.shape.split()[row.cut],))
        cut = _cut(stacked, sizes, place[axis], layout.size(axis))
        if cut is None:
            return None
        region[row.cut], target[row.cut], blocks = cut
    return ParameterSlice(
        _hf_name(row).format(**at),
        shape,
        tuple(region),
        chunk,
        _megatron_name(row, spec).format(**at),
        blocks,
        tuple(target),
    )


def _cut(
    stacked: Stacked, sizes: dict[str, int], index: int, parts: int
) -> tuple[tuple[int, int], tuple[int, int], int] | None:
    """The ``index``-th of ``parts``: range of the Hugging Face tensor, target, blocks.

    Megatron's whole dimension repeats the stack ``groups`` times and is cut evenly: into whole
    stacks or, when there are fewer of them than parts (key-value heads), into parts of one.
    """
    groups = parts if stacked.groups is None else sizes[stacked.groups]
    rows = [sizes[name] // groups for name in stacked.rows]
    before, size = sum(rows[: stacked.index]), rows[stacked.index]
    blocks, sharers = max(1, groups // parts), max(1, parts // groups)
    window = sum(rows) // sharers
    offset = index % sharers * window
    start, stop = max(before, offset), min(before + size, offset + window)
    if start >= stop:
        return None
    first, last = index * groups // parts * size, (index * groups // parts + blocks - 1) * size
    region = (first + start - before, last + stop - before)
    return region, (start - offset, stop - offset), blocks


def _hf_name(row: Row) -> str:
    if row.scope in ("first", "last", "copy"):
        return row.hf
    experts = "mlp.experts.{expert}." if row.scope == "expert" else ""
    return "model.layers.{layer}." + experts + row.hf


def _megatron_name(row: Row, spec: Spec) -> str:
    name = row.fused if row.fused is not None and spec.fused_norms else row.megatron
    if row.scope in ("first", "last", "copy"):
        return name
    if row.scope == "expert" and spec.grouped_experts:
        return "{block}mlp.experts." + name + "{local_expert}"
    experts = "mlp.experts.local_experts.{local_expert}." if row.scope == "expert" else ""
    return "{block}" + experts + name
