"""SGLang 0.5.23's parameters: which rectangle of which Hugging Face tensor each engine rank holds.

One row per parameter that SGLang fuses or cuts; all others have Hugging Face's name and are whole
on every rank. The dimension that is cut is the learner's. Read from sglang/srt: models/deepseek_v2,
llama, qwen2; layers/linear, vocab_parallel_embedding, moe/fused_moe_triton/layer; runtime_context
for the ranks. Engines run with --disable-shared-experts-fusion. Pure Python: imports no torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from r1mega.config import network, schema
from r1mega.parallel.layout import Layout
from r1mega.weights.blocks import BLOCK, scale_name, scale_region, scale_shape
from r1mega.weights.holders import Held
from r1mega.weights.names import Region, Row, Scope, rows_by_scope, sites, tensor_sizes

Axis = Literal["attention", "dense", "shared", "expert", "embedding", "head"]

_VOCABULARY_MULTIPLE = 64  # DEFAULT_VOCAB_PADDING_SIZE


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLayout:
    """How one SGLang server is spread over its ``tp`` ranks.

    ``dp`` above 1 is dp-attention: attention runs on tp / dp ranks, everything else on all of them.
    The last three follow from further flags of the server, named beside them.
    """

    tp: int = 1
    ep: int = 1
    dp: int = 1
    quantized: bool = False  # FP8 weights with scales per block of 128 x 128
    dense_replicated: bool = False  # --moe-dense-tp-size 1
    shared_replicated: bool = False  # --moe-a2a-backend deepep and its like
    dp_head: bool = False  # --enable-dp-lm-head

    def __post_init__(self) -> None:
        for name in ("ep", "dp"):
            if self.tp % getattr(self, name):
                raise ValueError(
                    f"an engine's {name} ({getattr(self, name)}) must divide its tp ({self.tp})"
                )

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

    A target has one dimension more than the region where experts are stacked.
    """

    hf_name: str
    hf_shape: tuple[int, ...]
    region: Region
    parameter: str
    target: Region


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
    raise NotImplementedError


def engine_holders(model: schema.Model, layout: EngineLayout) -> dict[str, Held]:
    """The same by tensor: its distinct regions and the engine ranks of each, in forward order."""
    raise NotImplementedError
