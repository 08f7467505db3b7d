"""SGLang 0.5.23's parameters: which rectangle of which Hugging Face tensor each engine rank holds.

One row per parameter that SGLang fuses or cuts; all others have Hugging Face's name and are whole
on every rank. The dimension that is cut is the learner's. Read from sglang/srt: models/deepseek_v2,
llama, qwen2; layers/linear, vocab_parallel_embedding, moe/fused_moe_triton/layer; runtime_context
for the ranks. Engines run with --disable-shared-experts-fusion. Pure Python: imports no torch.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from r1mega.config import network, schema
from r1mega.parallel.layout import Layout
from r1mega.weights.blocks import BLOCK, scale_name, scale_region, scale_shape
from r1mega.weights.holders import Held
from r1mega.weights.names import (
    Row,
    Scope,
    Site,
    is_float32,
    rows_by_scope,
    sites,
    tensor_sizes,
)
from r1mega.weights.regions import Region, extent, is_empty, within

Axis = Literal["attention", "dense", "shared", "expert", "embedding", "head"]

CODES, FLOAT32 = "float8_e4m3fn", "float32"  # torch's names
_VOCABULARY_MULTIPLE = 64  # DEFAULT_VOCAB_PADDING_SIZE


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLayout:
    """How one SGLang server is spread over its ``tp`` ranks.

    ``dp`` above 1 is dp-attention: attention runs on tp / dp ranks, everything else on all of them.
    Other fields follow from further flags of the server. The embedded engine is not ``fused``: it
    has one rank, and Hugging Face's tensors as they are.
    """

    tp: int = 1
    ep: int = 1
    dp: int = 1
    quantized: bool = False  # FP8 weights with scales per block of 128 x 128
    dense_replicated: bool = False  # --moe-dense-tp-size 1
    shared_replicated: bool = False  # --moe-a2a-backend deepep and its like
    dp_head: bool = False  # --enable-dp-lm-head
    fused: bool = True

    def __post_init__(self) -> None:
        for name in ("ep", "dp"):
            if self.tp % getattr(self, name):
                raise ValueError(
                    f"an engine's {name} ({getattr(self, name)}) must divide its tp ({self.tp})"
                )
        if self.tp > 1 and not self.fused:
            raise ValueError(f"an engine of Hugging Face's tensors has tp 1, not {self.tp}")

    def parts(self, axis: Axis) -> int:
        """Into how many parts what lies along ``axis`` is cut."""
        attention = self.tp // self.dp
        return {
            "attention": attention,
            "embedding": attention,
            "head": attention if self.dp_head else self.tp,
            "dense": 1 if self.dense_replicated else self.tp,
            "shared": 1 if self.shared_replicated else self.tp,
            "expert": self.tp // self.ep,
        }[axis]

    def expert_rank(self, rank: int) -> int:
        """The expert-parallel rank of ``rank``: neighbours share an expert."""
        return rank // self.parts("expert")


@dataclass(frozen=True, slots=True)
class EngineRow:
    """A parameter: the Hugging Face tensors ``members``, each cut along ``axis``, stacked."""

    scope: Scope
    parameter: str
    members: tuple[str, ...]
    axis: Axis | None


@dataclass(frozen=True, slots=True)
class EngineSlice:
    """``hf_name[region]`` lies at ``parameter[target]`` on some rank of an engine.

    A target has one dimension more than the region where experts are stacked. ``dtype`` is torch's
    name of the parameter's, None: the engine's own.
    """

    hf_name: str
    hf_shape: tuple[int, ...]
    region: Region
    parameter: str
    target: Region
    dtype: str | None


# fmt: off
ENGINE_TABLE = (
    EngineRow("first", "model.embed_tokens.weight", ("model.embed_tokens.weight",), "embedding"),
    EngineRow("layer", "self_attn.qkv_proj.weight", (
        "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight",
    ), "attention"),
    EngineRow("layer", "self_attn.qkv_proj.bias", (
        "self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias",
    ), "attention"),
    EngineRow("layer", "self_attn.fused_qkv_a_proj_with_mqa.weight", (
        "self_attn.q_a_proj.weight", "self_attn.kv_a_proj_with_mqa.weight",
    ), None),
    EngineRow("layer", "self_attn.q_proj.weight", ("self_attn.q_proj.weight",), "attention"),
    EngineRow("layer", "self_attn.q_b_proj.weight", ("self_attn.q_b_proj.weight",), "attention"),
    EngineRow("layer", "self_attn.kv_b_proj.weight", ("self_attn.kv_b_proj.weight",), "attention"),
    EngineRow("layer", "self_attn.o_proj.weight", ("self_attn.o_proj.weight",), "attention"),
    EngineRow("dense", "mlp.gate_up_proj.weight", (
        "mlp.gate_proj.weight", "mlp.up_proj.weight",
    ), "dense"),
    EngineRow("dense", "mlp.down_proj.weight", ("mlp.down_proj.weight",), "dense"),
    EngineRow("moe", "mlp.shared_experts.gate_up_proj.weight", (
        "mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight",
    ), "shared"),
    EngineRow("moe", "mlp.shared_experts.down_proj.weight", (
        "mlp.shared_experts.down_proj.weight",
    ), "shared"),
    EngineRow("expert", "w13_weight", ("gate_proj.weight", "up_proj.weight"), "expert"),
    EngineRow("expert", "w2_weight", ("down_proj.weight",), "expert"),
    EngineRow("last", "lm_head.weight", ("lm_head.weight",), "head"),
)
# fmt: on


def engine_slices(model: schema.Model, layout: EngineLayout, rank: int) -> list[EngineSlice]:
    """All that ``rank`` of an engine holds, in forward order; without MTP layers.

    Raises ValueError for a layout that SGLang could not cut the network into.
    """
    cuts = {
        scope: [cut for cut in row if not is_empty(cut.region)]
        for scope, row in _cuts(model, layout, rank).items()
    }
    found = []
    for site in sites(model, _experts(layout), ep=layout.expert_rank(rank)):
        stacked = tuple((index, index + 1) for index in _stacked(site, layout))
        prefix = _without_expert(site.hf) if stacked else site.hf
        found += [
            EngineSlice(
                site.hf + cut.hf,
                cut.shape,
                cut.region,
                prefix + cut.parameter,
                stacked + cut.target,
                cut.dtype,
            )
            for cut in cuts[site.scope]
        ]
    return found


@dataclass(frozen=True, slots=True)
class EngineTensor:
    """Who holds what of a Hugging Face tensor, and where: in the same place on every rank.

    ``dtype`` is torch's name, None for the engine's own dtype. ``above`` counts the parameter's
    rows before this tensor's, ``stacked`` is its index among the rank's experts. The same kind of
    tensor in different layers is one object.
    """

    held: Held
    dtype: str | None
    hf: str  # how the tensor's name ends
    parameter: str  # how the parameter's name ends
    above: int
    stacked: tuple[int, ...]

    def parameter_of(self, hf_name: str) -> str:
        """The full name, for the tensor of this full name."""
        prefix = hf_name.removesuffix(self.hf)
        return (_without_expert(prefix) if self.stacked else prefix) + self.parameter

    def target(self, region: Region, held: Region) -> Region:
        """Where ``region`` of the tensor lies on a rank that holds ``held`` of it."""
        (start, stop), *columns = within(region, held)
        rows = start + self.above, stop + self.above
        return (*((index, index + 1) for index in self.stacked), rows, *columns)


def engine_tensors(model: schema.Model, layout: EngineLayout) -> dict[str, EngineTensor]:
    """What ``engine_slices`` says of all ranks, by Hugging Face name, in forward order."""
    cuts = [_cuts(model, layout, rank) for rank in range(layout.tp)]
    neighbours = layout.parts("expert")
    same: dict[tuple[Held, str | None], Held] = {}
    alike: dict[tuple[Scope, int | None, int], list[EngineTensor]] = {}
    tensors: dict[str, EngineTensor] = {}
    for site in sites(model, _experts(layout)):
        key = site.scope, site.ep, site.local_expert
        if key not in alike:
            ranks = range(layout.tp)
            if site.ep is not None:
                ranks = ranks[site.ep * neighbours : (site.ep + 1) * neighbours]
            alike[key] = []
            for cut, *others in zip(*(cuts[rank][site.scope] for rank in ranks), strict=True):
                held = _held([cut, *others], ranks, cut.shape)
                held = same.setdefault((held, cut.dtype), held)
                above, stacked = cut.target[0][0], _stacked(site, layout)
                tensor = EngineTensor(held, cut.dtype, cut.hf, cut.parameter, above, stacked)
                alike[key].append(tensor)
        tensors |= ((site.hf + tensor.hf, tensor) for tensor in alike[key])
    return tensors


@dataclass(frozen=True, slots=True)
class _Cut:
    """What a rank holds of a row's tensor, wherever the row's scope is."""

    hf: str
    shape: tuple[int, ...]
    region: Region
    parameter: str
    target: Region
    dtype: str | None


def _cuts(model: schema.Model, layout: EngineLayout, rank: int) -> dict[Scope, list[_Cut]]:
    """Every rank has the same rows in the same order; a region may be empty."""
    _check(model, layout)
    sizes = tensor_sizes(model)
    cuts: dict[Scope, list[_Cut]] = {}
    for scope, rows in rows_by_scope(model).items():
        table = ENGINE_TABLE if layout.fused else ()
        fused = {row.hf: _engine_row(row, rows, table) for row in rows}
        regions = {row.hf: _region(row, fused[row.hf], sizes, layout, rank) for row in rows}
        cuts[scope] = []
        for row in rows:
            shape = tuple(sizes[name] for name in row.shape.split())
            cut = _cut(row.hf, shape, fused[row.hf], regions)
            if layout.quantized and row.fp8:
                cuts[scope] += replace(cut, dtype=CODES), _scales(cut, layout)
            else:
                cuts[scope].append(cut)
    return cuts


def _engine_row(row: Row, rows: tuple[Row, ...], table: tuple[EngineRow, ...]) -> EngineRow:
    """The first whose members the network has; unlisted ones are whole under their own name."""
    present = {other.hf for other in rows}
    fitting = (
        engine_row
        for engine_row in table
        if engine_row.scope == row.scope
        and row.hf in engine_row.members
        and present.issuperset(engine_row.members)
    )
    return next(fitting, EngineRow(row.scope, row.hf, (row.hf,), None))


def _region(
    row: Row, engine_row: EngineRow, sizes: dict[str, int], layout: EngineLayout, rank: int
) -> Region:
    dims = row.shape.split()
    spans = [(0, sizes[name]) for name in dims]
    if row.cut is not None and engine_row.axis is not None:
        parts = layout.parts(engine_row.axis)
        spans[row.cut] = _span(dims[row.cut], sizes, rank % parts, parts)
    return tuple(spans)


def _span(dim: str, sizes: dict[str, int], index: int, parts: int) -> tuple[int, int]:
    """The ``index``-th of ``parts`` of a dimension."""
    size = sizes[dim]
    if dim == "keys" and parts > (heads := sizes["key_value_heads"]):
        index, parts = index * heads // parts, heads  # ranks that share a head
    width = size // parts
    if dim == "vocab":
        width = vocabulary_rows(size, parts)
    elif size % parts:
        raise ValueError(
            f"an engine would have to cut {size} ({dim}) into {parts} equal parts: choose its tp, "
            "ep and dp so that it can"
        )
    return min(index * width, size), min((index + 1) * width, size)


def vocabulary_rows(size: int, parts: int) -> int:
    """Of the embedding or the head on each of ``parts`` ranks, padding included."""
    padded = _round_up(size, _VOCABULARY_MULTIPLE)
    if padded % parts:
        padded = _round_up(size, _VOCABULARY_MULTIPLE * parts)
    return padded // parts


def _cut(
    hf: str, shape: tuple[int, ...], engine_row: EngineRow, regions: dict[str, Region]
) -> _Cut:
    members = engine_row.members
    above = sum(extent(regions[name])[0] for name in members[: members.index(hf)])
    rows, *columns = extent(regions[hf])
    target = ((above, above + rows), *((0, size) for size in columns))
    dtype = FLOAT32 if is_float32(hf) else None
    return _Cut(hf, shape, regions[hf], engine_row.parameter, target, dtype)


def _scales(cut: _Cut, layout: EngineLayout) -> _Cut:
    """The scales of a quantised weight, which lie as their blocks do."""
    starts = [start for start, _ in (*cut.region, *cut.target)]
    inner = [stop for (_, stop), size in zip(cut.region, cut.shape, strict=True) if stop < size]
    if any(edge % BLOCK for edge in (*starts, *inner)):
        raise ValueError(
            f"an engine of tp {layout.tp}, dp {layout.dp} and ep {layout.ep} would hold "
            f"{cut.hf}{list(cut.region)} at {cut.parameter}{list(cut.target)}, but FP8 weights are "
            f"cut at multiples of {BLOCK} only: choose other sizes or rollout.quantization=none"
        )
    return _Cut(
        scale_name(cut.hf),
        scale_shape(cut.shape),
        scale_region(cut.region),
        scale_name(cut.parameter),
        scale_region(cut.target),
        FLOAT32,
    )


def _held(alike: Iterable[_Cut], ranks: Iterable[int], shape: tuple[int, ...]) -> Held:
    parts: dict[Region, tuple[int, ...]] = {}
    for cut, rank in zip(alike, ranks, strict=True):
        if not is_empty(cut.region):
            parts[cut.region] = (*parts.get(cut.region, ()), rank)
    return Held(shape, tuple(parts.items()))


def _check(model: schema.Model, layout: EngineLayout) -> None:
    """What SGLang asserts of a network and a layout, but for the widths that ``_span`` divides."""
    attention, heads = layout.parts("attention"), model.num_attention_heads
    if heads % attention:
        raise ValueError(
            f"an engine's tp / dp ({layout.tp} / {layout.dp}) must divide the attention heads "
            f"({heads})"
        )
    if not network.is_dense(model):
        if model.n_routed_experts % layout.ep:
            raise ValueError(
                f"an engine's ep ({layout.ep}) must divide the experts ({model.n_routed_experts})"
            )
        return
    if layout.dp > 1 or layout.ep > 1:
        raise ValueError(
            f"an engine of a dense model has neither dp-attention nor experts: its dp "
            f"({layout.dp}) and ep ({layout.ep}) must be 1"
        )
    heads = network.key_value_heads(model)
    if heads % attention and attention % heads:
        raise ValueError(
            f"an engine's tp ({layout.tp}) must divide the key-value heads ({heads}) or be a "
            "multiple of them"
        )


def _experts(layout: EngineLayout) -> Layout:
    """A layout with this one's expert parallelism, and nothing else."""
    return Layout(world=layout.ep, ep=layout.ep)


def _stacked(site: Site, layout: EngineLayout) -> tuple[int, ...]:
    """The index of an expert in the parameter that stacks a rank's; nothing for other tensors."""
    return (site.local_expert,) if site.ep is not None and layout.fused else ()


def _without_expert(prefix: str) -> str:
    """``model.layers.3.mlp.experts.`` of ``model.layers.3.mlp.experts.17.``"""
    return prefix[: prefix.index("experts.") + len("experts.")]


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
