"""The only table of parameter names: Hugging Face <-> Megatron, how each is cut, and its shape.

One row per kind of parameter. From it come loading, saving, the stream to the engines, parameter
counts and the tests. Every row maps a rectangle of a Hugging Face tensor to the same rectangle of
each of some equal blocks of this rank's Megatron tensor; no other layout change is needed
(Megatron's MLA takes the rotary weights interleaved, its other attention in halves, both as Hugging
Face stores them). A row and a site of the network, which is a pipeline stage and a place in it,
make a parameter. Pure Python: imports no torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Literal, get_args

from r1mega.config import network, schema
from r1mega.parallel.layout import Layout
from r1mega.weights.cuts import Cut, Stacked, cut_dim, stack
from r1mega.weights.regions import Region, whole

# "copy": on a last stage that is not the first. "mtp": an MTP layer, beside its transformer layer.
Scope = Literal["first", "layer", "dense", "moe", "expert", "last", "copy", "mtp"]
Feature = Literal[
    "mla", "q_lora", "q_full", "gqa", "qkv_bias", "o_bias", "head", "tied", "mtp", "mtp_copies"
]


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of parameter, named within its scope's prefix.

    ``shape`` names entries of ``tensor_sizes``. ``cut`` is the dimension split over tp (over etp
    inside an expert). ``fused`` is the name under TransformerEngine's spec, which folds some norms
    into the linear layer behind them. ``only``: the feature without which a network lacks the row.
    ``fp8``: DeepSeek-V3's FP8 checkpoints keep it as codes and scales.
    """

    scope: Scope
    hf: str
    megatron: str
    shape: str
    cut: int | None = None
    stacked: Stacked | None = None
    fused: str | None = None
    only: Feature | None = None
    fp8: bool = False

    @property
    def axis(self) -> Literal["tp", "etp"]:
        """Of the ranks that share a cut tensor."""
        return "etp" if self.scope == "expert" else "tp"


@dataclass(frozen=True, slots=True)
class Spec:
    """Which modules the network is built of, as far as it changes names."""

    fused_norms: bool = False  # TransformerEngine's layer spec
    grouped_experts: bool = False  # TEGroupedMLP: one tensor per expert in one module
    mtp: bool = False  # the MTP layers, on the last stage
    mtp_copies: bool = False  # with the copies of embedding and head that published ones have


@dataclass(frozen=True, slots=True)
class Site:
    """A place of the network that has all parameters of one scope, on some ranks of ``stage``.

    ``hf`` and ``megatron`` are what stands before a row's names there, ``suffix`` what stands
    behind Megatron's. ``ep`` is the rank that holds an expert, as its ``local_expert``-th.
    """

    scope: Scope
    stage: int
    chunk: int  # the virtual stage
    hf: str = ""
    megatron: str = ""
    suffix: str = ""
    ep: int | None = None
    local_expert: int = 0


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


Q, K, V = stack("queries", "keys", "keys", groups="key_value_heads")
GATE, UP = stack("dense", "dense")
SHARED_GATE, SHARED_UP = stack("shared", "shared")
EXPERT_GATE, EXPERT_UP = stack("expert", "expert")

# fmt: off
TABLE = (
    Row("first", "model.embed_tokens.weight", "embedding.word_embeddings.weight",
        "vocab hidden", 0),
    Row("layer", "input_layernorm.weight", "input_layernorm.weight", "hidden", only="mla"),
    Row("layer", "input_layernorm.weight", "input_layernorm.weight", "hidden", only="gqa",
        fused="self_attention.linear_qkv.layer_norm_weight"),
    Row("layer", "self_attn.q_proj.weight", "self_attention.linear_qkv.weight",
        "queries hidden", 0, Q, only="gqa", fp8=True),
    Row("layer", "self_attn.k_proj.weight", "self_attention.linear_qkv.weight",
        "keys hidden", 0, K, only="gqa", fp8=True),
    Row("layer", "self_attn.v_proj.weight", "self_attention.linear_qkv.weight",
        "keys hidden", 0, V, only="gqa", fp8=True),
    Row("layer", "self_attn.q_proj.bias", "self_attention.linear_qkv.bias",
        "queries", 0, Q, only="qkv_bias"),
    Row("layer", "self_attn.k_proj.bias", "self_attention.linear_qkv.bias",
        "keys", 0, K, only="qkv_bias"),
    Row("layer", "self_attn.v_proj.bias", "self_attention.linear_qkv.bias",
        "keys", 0, V, only="qkv_bias"),
    Row("layer", "self_attn.q_proj.weight", "self_attention.linear_q_proj.weight",
        "queries hidden", 0, only="q_full", fp8=True),
    Row("layer", "self_attn.q_a_proj.weight", "self_attention.linear_q_down_proj.weight",
        "q_rank hidden", only="q_lora", fp8=True),
    Row("layer", "self_attn.q_a_layernorm.weight", "self_attention.q_layernorm.weight",
        "q_rank", fused="self_attention.linear_q_up_proj.layer_norm_weight", only="q_lora"),
    Row("layer", "self_attn.q_b_proj.weight", "self_attention.linear_q_up_proj.weight",
        "queries q_rank", 0, only="q_lora", fp8=True),
    Row("layer", "self_attn.kv_a_proj_with_mqa.weight", "self_attention.linear_kv_down_proj.weight",
        "latent hidden", only="mla", fp8=True),
    Row("layer", "self_attn.kv_a_layernorm.weight", "self_attention.kv_layernorm.weight",
        "kv_rank", fused="self_attention.linear_kv_up_proj.layer_norm_weight", only="mla"),
    Row("layer", "self_attn.kv_b_proj.weight", "self_attention.linear_kv_up_proj.weight",
        "keys_values kv_rank", 0, only="mla", fp8=True),
    Row("layer", "self_attn.o_proj.weight", "self_attention.linear_proj.weight",
        "hidden values", 1, fp8=True),
    Row("layer", "self_attn.o_proj.bias", "self_attention.linear_proj.bias",
        "hidden", only="o_bias"),
    Row("dense", "post_attention_layernorm.weight", "pre_mlp_layernorm.weight",
        "hidden", fused="mlp.linear_fc1.layer_norm_weight"),
    Row("dense", "mlp.gate_proj.weight", "mlp.linear_fc1.weight", "dense hidden", 0, GATE,
        fp8=True),
    Row("dense", "mlp.up_proj.weight", "mlp.linear_fc1.weight", "dense hidden", 0, UP, fp8=True),
    Row("dense", "mlp.down_proj.weight", "mlp.linear_fc2.weight", "hidden dense", 1, fp8=True),
    Row("moe", "post_attention_layernorm.weight", "pre_mlp_layernorm.weight", "hidden"),
    Row("moe", "mlp.gate.weight", "mlp.router.weight", "experts hidden"),
    Row("moe", "mlp.gate.e_score_correction_bias", "mlp.router.expert_bias", "experts"),
    Row("moe", "mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.linear_fc1.weight",
        "shared hidden", 0, SHARED_GATE, fp8=True),
    Row("moe", "mlp.shared_experts.up_proj.weight", "mlp.shared_experts.linear_fc1.weight",
        "shared hidden", 0, SHARED_UP, fp8=True),
    Row("moe", "mlp.shared_experts.down_proj.weight", "mlp.shared_experts.linear_fc2.weight",
        "hidden shared", 1, fp8=True),
    Row("expert", "gate_proj.weight", "linear_fc1.weight", "expert hidden", 0, EXPERT_GATE,
        fp8=True),
    Row("expert", "up_proj.weight", "linear_fc1.weight", "expert hidden", 0, EXPERT_UP, fp8=True),
    Row("expert", "down_proj.weight", "linear_fc2.weight", "hidden expert", 1, fp8=True),
    Row("last", "model.norm.weight", "decoder.final_layernorm.weight", "hidden"),
    Row("last", "lm_head.weight", "output_layer.weight", "vocab hidden", 0, only="head"),
    # A tied head and MTP layers need the embedding where they are.
    Row("copy", "model.embed_tokens.weight", "output_layer.weight", "vocab hidden", 0, only="tied"),
    Row("copy", "model.embed_tokens.weight", "embedding.word_embeddings.weight",
        "vocab hidden", 0, only="mtp"),
    Row("mtp", "enorm.weight", "enorm.weight", "hidden"),
    Row("mtp", "hnorm.weight", "hnorm.weight", "hidden"),
    Row("mtp", "eh_proj.weight", "eh_proj.weight", "hidden twice_hidden", 0),
    Row("mtp", "shared_head.norm.weight", "final_layernorm.weight", "hidden"),
    # Published MTP layers also hold copies of embedding and head; the main ones serve both.
    Row("mtp", "embed_tokens.weight", "embedding.word_embeddings.weight",
        "vocab hidden", 0, only="mtp_copies"),
    Row("mtp", "shared_head.head.weight", "output_layer.weight",
        "vocab hidden", 0, only="mtp_copies"),
)
# fmt: on


def tensor_sizes(m: schema.Model) -> dict[str, int]:
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
        "mtp_copies": spec.mtp_copies,
    }
    return {feature for feature, present in has.items() if present}


def rows_by_scope(model: schema.Model, spec: Spec = Spec()) -> dict[Scope, tuple[Row, ...]]:
    """The rows that the network has."""
    features = _features(model, spec)
    rows = [row for row in TABLE if row.only is None or row.only in features]
    return {scope: tuple(r for r in rows if r.scope == scope) for scope in get_args(Scope)}


def hf_shapes(model: schema.Model, spec: Spec = Spec()) -> dict[str, tuple[int, ...]]:
    """Every Hugging Face tensor and its full shape; those of MTP layers if ``spec`` builds them."""
    sizes, rows = tensor_sizes(model), rows_by_scope(model, spec)
    return {
        site.hf + row.hf: tuple(sizes[name] for name in row.shape.split())
        for site in sites(model, Layout(world=1), spec)
        for row in rows[site.scope]
    }


def fp8_weights(model: schema.Model, spec: Spec = Spec()) -> frozenset[str]:
    """The Hugging Face tensors that FP8 checkpoints keep as codes and scales."""
    rows = rows_by_scope(model, spec)
    return frozenset(
        site.hf + row.hf
        for site in sites(model, Layout(world=1), spec)
        for row in rows[site.scope]
        if row.fp8
    )


def is_float32(name: str) -> bool:
    """Whether a tensor is fp32 whatever the model's precision: the expert bias."""
    return name.endswith(".e_score_correction_bias")


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
    sizes, rows = tensor_sizes(model), rows_by_scope(model)
    return sum(
        count * prod(sizes[name] for name in row.shape.split())
        for scope, count in times.items()
        for row in rows[scope]
    )


def parameter_slices(
    model: schema.Model, layout: Layout, rank: int, spec: Spec = Spec()
) -> list[ParameterSlice]:
    """Which rectangle of which Hugging Face tensor ``rank`` holds, in forward order."""
    place, sizes = layout.coordinates(rank), tensor_sizes(model)
    held = {
        scope: [
            (row, cut)
            for row in rows
            if (cut := cut_row(row, sizes, place[row.axis], layout.size(row.axis))) is not None
        ]
        for scope, rows in rows_by_scope(model, spec).items()
    }
    return [
        ParameterSlice(
            site.hf + row.hf,
            cut.shape,
            cut.region,
            site.chunk,
            _megatron_name(row, site, spec),
            cut.blocks,
            cut.target,
        )
        for site in sites(model, layout, spec, stage=place["pp"], ep=place["ep"])
        for row, cut in held[site.scope]
    ]


def sites(
    model: schema.Model,
    layout: Layout,
    spec: Spec = Spec(),
    *,
    stage: int | None = None,
    ep: int | None = None,
) -> Iterator[Site]:
    """All places of the network, in forward order; those of one stage, and experts of one rank."""
    num_layers = model.num_hidden_layers
    stage_layers = layout.stage_layers(num_layers)
    stages = range(layout.pp) if stage is None else (stage,)
    for chunk, at_stage in product(range(layout.vpp or 1), stages):
        layers = stage_layers[at_stage][chunk]
        if is_first := layers.start == 0:
            yield Site("first", at_stage, chunk)
        for local_layer, layer in enumerate(layers):
            at = Site("layer", at_stage, chunk, _layer(layer), f"decoder.layers.{local_layer}.")
            yield from _layer_sites(model, layout, spec, layer, at, ep)
        if layers.stop != num_layers:
            continue
        yield Site("last", at_stage, chunk)
        if not is_first:
            yield Site("copy", at_stage, chunk)
        for depth in range(model.num_nextn_predict_layers if spec.mtp else 0):
            layer = num_layers + depth
            at = Site("mtp", at_stage, chunk, _layer(layer), f"mtp.layers.{depth}.")
            yield at
            at = replace(at, megatron=at.megatron + "transformer_layer.")
            yield from _layer_sites(model, layout, spec, layer, at, ep)


def _layer_sites(
    model: schema.Model, layout: Layout, spec: Spec, layer: int, at: Site, ep: int | None
) -> Iterator[Site]:
    """Those of one transformer layer, of which ``at`` has stage and prefixes."""
    yield replace(at, scope="layer")
    if layer < network.num_dense_layers(model):
        yield replace(at, scope="dense")
        return
    yield replace(at, scope="moe")
    num_experts = model.n_routed_experts // layout.ep
    for rank in range(layout.ep) if ep is None else (ep,):
        for local_expert in range(num_experts):
            hf = f"{at.hf}mlp.experts.{rank * num_experts + local_expert}."
            megatron, suffix = f"{at.megatron}mlp.experts.local_experts.{local_expert}.", ""
            if spec.grouped_experts:
                megatron, suffix = f"{at.megatron}mlp.experts.", str(local_expert)
            yield Site("expert", at.stage, at.chunk, hf, megatron, suffix, rank, local_expert)


def cut_row(row: Row, sizes: dict[str, int], index: int, parts: int) -> Cut | None:
    """The ``index``-th of ``parts`` along the row's axis; None: nothing of the tensor."""
    shape = tuple(sizes[name] for name in row.shape.split())
    everything = whole(shape)
    if row.cut is None:
        return Cut(shape, everything, 1, everything)
    stacked = row.stacked or Stacked(0, (row.shape.split()[row.cut],))
    if (cut := cut_dim(stacked, sizes, index, parts)) is None:
        return None
    span, target, blocks = cut
    before, after = everything[: row.cut], everything[row.cut + 1 :]
    return Cut(shape, (*before, span, *after), blocks, (*before, target, *after))


def _layer(number: int) -> str:
    return f"model.layers.{number}."


def _megatron_name(row: Row, site: Site, spec: Spec) -> str:
    name = row.fused if row.fused is not None and spec.fused_norms else row.megatron
    return site.megatron + name + site.suffix
