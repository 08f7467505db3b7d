"""The network's sizes to megatron-core's configuration: pure translation."""

from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any

import torch
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from r1mega.config import network, schema
from r1mega.config.derived import MtpMode
from r1mega.parallel.layout import Layout


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildOptions:
    """How the network is held and run, as opposed to what it is."""

    precision: str = "fp32"
    layer_spec: str = "local"
    recompute: str = "none"
    recompute_modules: list[str] = field(default_factory=lambda: ["core_attn"])
    dispatcher: str = "alltoall"
    grouped_gemm: bool = False
    fp8: str = "none"
    expert_bias_update_rate: float = 0.0
    mtp: MtpMode = "none"
    megatron: dict[str, Any] = field(default_factory=dict)


def transformer_config(
    model: schema.Model, layout: Layout, options: BuildOptions
) -> TransformerConfig:
    """``options.megatron`` overrides what follows from the rest; it passed ``check_fields``."""
    values = {
        **_network(model),
        **({} if network.is_dense(model) else _mixture(model, options)),
        **_parallelism(layout),
        **_numerics(options),
        **options.megatron,
    }
    config = _kind(model)(**values)
    # Microbatches are packed to their own lengths, so stages announce the shape first. Said only
    # now, because Megatron refuses it with the allgather dispatcher, for fear of lengths that
    # differ between ranks that share experts: the learner pads those to equal ones.
    config.variable_seq_lengths = layout.pp > 1
    return config


def check_fields(model: schema.Model, megatron: dict[str, Any]) -> None:
    """Raises ValueError on a key of ``learner.megatron`` that megatron-core does not know, or that
    would make the learner's network another one than ``model``, which engines run."""
    kind = _kind(model)
    known = [f.name for f in fields(kind)]
    ours = _network(model)
    for name, value in megatron.items():
        if name in ours:
            raise ValueError(
                f"learner.megatron.{name}={value}: model.* decides this, for engines too; remove it"
            )
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "remove it"
            raise ValueError(
                f"learner.megatron.{name} is no field of megatron-core's {kind.__name__}; {hint}"
            )


def _kind(model: schema.Model) -> type[TransformerConfig]:
    return TransformerConfig if network.is_dense(model) else MLATransformerConfig


def _network(model: schema.Model) -> dict[str, Any]:
    """What the function of the weights is."""
    return {
        **(_grouped_query(model) if network.is_dense(model) else _deepseek_v3(model)),
        "num_layers": model.num_hidden_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "ffn_hidden_size": model.intermediate_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.rms_norm_eps,
        "init_method_std": model.initializer_range,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def _grouped_query(model: schema.Model) -> dict[str, Any]:
    return {
        "num_query_groups": network.key_value_heads(model),
        "kv_channels": network.head_dim(model),
        "add_qkv_bias": network.has_query_key_value_bias(model),
    }


def _deepseek_v3(model: schema.Model) -> dict[str, Any]:
    yarn = model.rope_scaling
    rope: dict[str, Any] = {"rope_type": "rope", "rotary_base": model.rope_theta}
    if yarn is not None:
        rope = {
            "rope_type": "yarn",
            "rotary_base": model.rope_theta,
            "rotary_scaling_factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_max_position_embeddings,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "mscale": yarn.mscale,
            "mscale_all_dim": yarn.mscale_all_dim,
        }
    return {
        **rope,
        **_experts(model),
        "q_lora_rank": model.q_lora_rank,
        "kv_lora_rank": model.kv_lora_rank,
        "qk_head_dim": model.qk_nope_head_dim,
        "qk_pos_emb_head_dim": model.qk_rope_head_dim,
        "v_head_dim": model.v_head_dim,
        "kv_channels": model.v_head_dim,
        "qk_layernorm": True,
    }


def _experts(model: schema.Model) -> dict[str, Any]:
    dense = model.first_k_dense_replace
    return {
        "num_moe_experts": model.n_routed_experts,
        "moe_router_topk": model.num_experts_per_tok,
        "moe_ffn_hidden_size": model.moe_intermediate_size,
        "moe_shared_expert_intermediate_size": model.n_shared_experts * model.moe_intermediate_size,
        "moe_layer_freq": [0] * dense + [1] * (model.num_hidden_layers - dense),
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_num_groups": model.n_group,
        "moe_router_group_topk": model.topk_group,
        "moe_router_topk_scaling_factor": model.routed_scaling_factor,
    }


def _mixture(model: schema.Model, options: BuildOptions) -> dict[str, Any]:
    """How experts and MTP layers are run and trained."""
    return {
        "mtp_num_layers": None if options.mtp == "none" else model.num_nextn_predict_layers,
        "moe_router_bias_update_rate": options.expert_bias_update_rate,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": options.grouped_gemm,
        "moe_permute_fusion": False,
        "moe_token_dispatcher_type": options.dispatcher,
    }


def _parallelism(layout: Layout) -> dict[str, Any]:
    interleaved = layout.vpp is not None
    return {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp,
        "context_parallel_size": layout.cp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "sequence_parallel": layout.tp > 1,
        "num_layers_in_first_pipeline_stage": layout.layers_in_first_stage,
        "num_layers_in_last_pipeline_stage": layout.layers_in_last_stage,
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
    }


def _numerics(options: BuildOptions) -> dict[str, Any]:
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    values: dict[str, Any] = {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": options.precision == "bf16",
        "attention_softmax_in_fp32": True,
        # The learner's loss is a sum that already carries its global weights: no further division.
        "calculate_per_token_loss": True,
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
    }
    if options.recompute == "full":
        values |= {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    elif options.recompute == "selective":
        values |= {
            "recompute_granularity": "selective",
            "recompute_modules": list(options.recompute_modules),
        }
    if options.fp8 == "blockwise":
        values |= {"fp8": "e4m3", "fp8_recipe": "blockwise"}
    return values
