"""Layer spec without TransformerEngine, right under tensor, sequence and expert parallelism.

megatron-core's own local spec knows no packed sequences and for MLA does not build in 0.16.1; three
of its modules are ours.
Shapes: S sequence, B batch (1 when packed), T packed tokens, N heads, D head size.
"""

import copy
from typing import Any

import torch
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from r1mega.parallel.context import zigzag_rows


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
    """Causal attention on packed sequences, cut over context-parallel ranks.

    Stock DotProductAttention has neither separate key and value sizes nor packing. Keys and values
    are gathered over cp, and the sums of their gradients scattered back; queries stay.
    """

    def __init__(
        self, config: Any, *, pg_collection: Any, softmax_scale: float | None = None, **_: Any
    ) -> None:
        super().__init__()
        self.scale = softmax_scale
        self.cp_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> Tensor:
        """Packed [T, N, D] tensors and their boundaries to [T, 1, N * D_value].

        Keys and values may have fewer heads, each for N / heads consecutive ones of the query.
        """
        assert packed_seq_params is not None, "the learner always packs"
        starts, width = packed_seq_params.cu_seqlens_q.long(), int(packed_seq_params.max_seqlen_q)
        cp = self.cp_group.size()
        own = places = _places(starts, width)
        mask = None
        if cp > 1:
            key = gather_from_sequence_parallel_region(key, group=self.cp_group)
            value = gather_from_sequence_parallel_region(value, group=self.cp_group)
            held = [zigzag_rows(starts, cp, rank) for rank in range(cp)]
            positions_T = places[held[self.cp_group.rank()]] % width
            places = places[torch.cat(held)]
            own = _places(starts // cp, width // cp)
            mask = _table(positions_T, own, starts, width // cp)[:, None, :, None] >= torch.arange(
                width, device=starts.device
            )
        # Padding is behind the sequences and the mask causal: no real token sees a padded one.
        out_BNSD = functional.scaled_dot_product_attention(
            _table(query, own, starts, width // cp).transpose(1, 2),
            _table(key, places, starts, width).transpose(1, 2),
            _table(value, places, starts, width).transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=key.shape[1] != query.shape[1],
        )
        return out_BNSD.transpose(1, 2).flatten(0, 1)[own].reshape(len(query), 1, -1)


def _places(starts: Tensor, width: int) -> Tensor:
    """Where each packed token stands in a [sequences * width] table."""
    lengths = starts.diff()
    shifts = torch.arange(len(lengths), device=starts.device) * width - starts[:-1]
    return torch.arange(int(starts[-1]), device=starts.device) + shifts.repeat_interleave(lengths)


def _table(values_T: Tensor, places_T: Tensor, starts: Tensor, width: int) -> Tensor:
    """Packed [T, ...] to [sequences, width, ...] with zeros behind each sequence."""
    batch = len(starts) - 1
    table = values_T.new_zeros(batch * width, *values_T.shape[1:])
    return table.index_copy(0, places_T, values_T).unflatten(0, (batch, width))


class BiasedRowParallelLinear(RowParallelLinear):
    """An output projection with a bias beside an MLP that has none (``attention_bias``)."""

    def __init__(self, *args: Any, bias: bool, **kwargs: Any) -> None:
        super().__init__(*args, bias=True, **kwargs)


def decoder_spec(
    config: TransformerConfig, vp_stage: int | None, *, attention_output_bias: bool
) -> Any:
    """The spec of this rank's decoder layers with our norm, attention and projections."""
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
        attention.core_attention = CoreAttention
        if attention_output_bias:
            attention.linear_proj = BiasedRowParallelLinear
        if not config.multi_latent_attention:
            continue
        attention.q_layernorm = attention.kv_layernorm = RMSNorm
        # TELinear, or what the CPU shim put in its place: the same weight on every tp rank.
        attention.linear_kv_down_proj = multi_latent_attention.TELinear
        attention.linear_q_down_proj = multi_latent_attention.TELinear
    return spec


def mtp_spec(config: TransformerConfig, decoder: Any, vp_stage: int | None) -> Any:
    """The spec of the MTP layers, whose transformer layer is the decoder's last; None elsewhere."""
    spec = gpt_layer_specs.get_gpt_mtp_block_spec(
        config, decoder, use_transformer_engine=False, vp_stage=vp_stage
    )
    for layer in spec.layer_specs if spec is not None else []:
        norms = layer.submodules
        norms.enorm = norms.hnorm = norms.layer_norm = RMSNorm
    return spec
