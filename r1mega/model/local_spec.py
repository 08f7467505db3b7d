"""Layer spec without TransformerEngine, right for MLA under tensor and expert parallelism.

megatron-core's own local spec for MLA does not build in 0.16.1; three of its modules are ours.
Shapes: S sequence, B batch (1 when packed), T packed tokens, N heads, D head size.
"""

import copy
from typing import Any

import torch
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import Tensor
from torch.nn import functional


class RMSNorm(torch.nn.Module):
    """RMSNorm whose weight carries the sequence-parallel mark (WrappedTorchNorm refuses it)."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


class CoreAttention(torch.nn.Module):
    """Causal attention for MLA head sizes on packed sequences.

    Stock DotProductAttention has neither separate key and value sizes nor packing.
    """

    def __init__(self, config: Any, *, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> Tensor:
        """Packed [T, N, D] tensors and their boundaries to [T, 1, N * D_value]."""
        assert packed_seq_params is not None, "the learner always packs"
        num_tokens = query.shape[0]
        rows, width = _padded_rows(packed_seq_params)
        # Right padding behind a causal mask: no real token sees a padded one.
        out_BNSD = functional.scaled_dot_product_attention(
            _pad(query, rows, width),
            _pad(key, rows, width),
            _pad(value, rows, width),
            is_causal=True,
            scale=self.scale,
        )
        out = out_BNSD.transpose(1, 2).flatten(0, 1)[rows]
        return out.reshape(num_tokens, 1, -1)


def _padded_rows(packed: PackedSeqParams) -> tuple[Tensor, int]:
    """Row of every packed token in a [batch * longest] table, and the longest length."""
    starts = packed.cu_seqlens_q.long()
    lengths = starts.diff()
    width = int(packed.max_seqlen_q)
    shifts = torch.arange(len(lengths), device=starts.device) * width - starts[:-1]
    rows = torch.arange(int(starts[-1]), device=starts.device) + shifts.repeat_interleave(lengths)
    return rows, width


def _pad(x: Tensor, rows: Tensor, width: int) -> Tensor:
    """[T, N, D] to [B, N, width, D] with zeros behind each sequence."""
    batch = int(rows[-1]) // width + 1
    table = x.new_zeros(batch * width, *x.shape[1:]).index_copy(0, rows, x)
    return table.unflatten(0, (batch, width)).transpose(1, 2)


def decoder_spec(config: MLATransformerConfig, vp_stage: int | None) -> Any:
    """The spec of this rank's decoder layers with our norm, attention and down projections."""
    spec = copy.deepcopy(
        gpt_layer_specs.get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=vp_stage
        )
    )
    spec.layer_norm = RMSNorm
    for layer in spec.layer_specs:
        layer.submodules.input_layernorm = RMSNorm
        layer.submodules.pre_mlp_layernorm = RMSNorm
        attention = layer.submodules.self_attention.submodules
        attention.q_layernorm = attention.kv_layernorm = RMSNorm
        attention.core_attention = CoreAttention
        # TELinear, or what the CPU shim put in its place: the same weight on every tp rank.
        attention.linear_kv_down_proj = multi_latent_attention.TELinear
        attention.linear_q_down_proj = multi_latent_attention.TELinear
    return spec
