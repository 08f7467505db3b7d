"""Constraints on how the learner computes: precision, recomputation, optimizer, schedule.

What only CUDA can do is refused on CPU here, before any process starts.
"""

from collections.abc import Iterator
from typing import Any

from r1mega.config import network
from r1mega.config.schema import Config, Learner, Model, Parallel, Stage

# What selective recompute may forget, by Megatron's names; each wants something to be there.
_MODULES = ("core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "moe_act", "shared_experts")
_OF_DEEPSEEK_V3 = ("mla_up_proj", "moe", "moe_act", "shared_experts")

_OURS = (
    "calculate_per_token_loss",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "sequence_parallel",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "pipeline_model_parallel_layout",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)
_KEYS = {
    "recompute_granularity": "learner.recompute",
    "recompute_modules": "learner.recompute_modules",
    "moe_token_dispatcher_type": "learner.dispatcher",
    "moe_grouped_gemm": "learner.grouped_gemm",
    "moe_router_bias_update_rate": "learner.expert_bias_update_rate",
    "fp8": "learner.fp8",
    "bf16": "learner.precision",
}
_AUXILIARY = (
    "Megatron weighs auxiliary losses by microbatch, so that their gradient would depend on "
    "packing and layout (learner.expert_bias_update_rate balances without a loss)"
)
_RANDOM = "its random draws differ from layout to layout"
_DEPENDS_ON_PACKING = {
    "moe_aux_loss_coeff": _AUXILIARY,
    "moe_z_loss_coeff": _AUXILIARY,
    "moe_router_load_balancing_type": _AUXILIARY,
    "moe_expert_capacity_factor": (
        "an expert's capacity is a share of the tokens of one microbatch on one rank, so which "
        "tokens are dropped would depend on packing and layout"
    ),
    "moe_input_jitter_eps": _RANDOM,
    "moe_router_force_load_balancing": _RANDOM,
    "hidden_dropout": _RANDOM,
    "attention_dropout": _RANDOM,
}


def learner_violations(config: Config) -> Iterator[str]:
    """One sentence for each setting that cannot run as told."""
    yield from _needs_cuda(config.learner, config.cluster.backend)
    yield from _transformer_engine(config.learner, config.cluster.backend)
    yield from _dispatcher(config.learner, config.parallel)
    yield from _recompute(config.learner, config.model)
    yield from _optimizer(config.learner)
    yield from _overlap(config.learner)
    yield from _megatron(config.learner.megatron)
    yield from _schedule(config.learner, config.stage)


def _needs_cuda(learner: Learner, backend: str) -> Iterator[str]:
    if backend == "cuda":
        return
    needs_cuda = {
        "learner.layer_spec=transformer_engine": learner.layer_spec == "transformer_engine",
        "learner.dispatcher=flex": learner.dispatcher == "flex",
        "learner.grouped_gemm=true": learner.grouped_gemm,
        "learner.fp8=blockwise": learner.fp8 == "blockwise",
        "learner.precision_aware_optimizer=true": learner.precision_aware_optimizer,
        f"learner.optimizer_offload={learner.optimizer_offload:g}": learner.optimizer_offload > 0,
    }
    for setting, is_set in needs_cuda.items():
        if is_set:
            yield f"{setting} needs cluster.backend=cuda, got cpu"


def _transformer_engine(learner: Learner, backend: str) -> Iterator[str]:
    if learner.grouped_gemm and learner.layer_spec == "local" and backend == "cuda":
        yield "learner.grouped_gemm=true needs learner.layer_spec=transformer_engine, got local"
    if learner.fp8 == "blockwise" and learner.layer_spec == "local":
        yield "learner.fp8=blockwise needs learner.layer_spec=transformer_engine, got local"
    if learner.fp8 == "blockwise" and learner.precision == "fp32":
        yield "learner.fp8=blockwise needs learner.precision=bf16, got fp32"


def _dispatcher(learner: Learner, parallel: Parallel) -> Iterator[str]:
    if learner.dispatcher == "flex" and parallel.ep * parallel.etp == 1:
        yield "learner.dispatcher=flex needs ep * etp of at least 2, got ep=1; use alltoall"


def _recompute(learner: Learner, model: Model) -> Iterator[str]:
    modules = learner.recompute_modules
    if learner.recompute != "selective":
        if modules != Learner().recompute_modules:
            yield (
                f"learner.recompute_modules={modules} has no meaning with "
                f"learner.recompute={learner.recompute}; use selective"
            )
        return
    if unknown := set(modules) - set(_MODULES):
        yield (
            f"learner.recompute_modules={modules}: {', '.join(sorted(unknown))} is none of "
            f"{', '.join(_MODULES)}"
        )
    if not modules:
        yield "learner.recompute_modules=[] recomputes nothing; use learner.recompute=none"
    if network.is_dense(model) and (absent := set(modules) & set(_OF_DEEPSEEK_V3)):
        yield (
            f"learner.recompute_modules={modules}: {model.architecture} has no "
            f"{', '.join(sorted(absent))}; use core_attn, layernorm, mlp"
        )
    elif "moe_act" in modules and not learner.grouped_gemm:
        yield "learner.recompute_modules: moe_act needs learner.grouped_gemm=true, got false"
    if "layernorm" in modules and learner.layer_spec == "local":
        yield (
            "learner.recompute_modules: layernorm needs learner.layer_spec=transformer_engine, "
            "got local"
        )


def _optimizer(learner: Learner) -> Iterator[str]:
    aware, offload = learner.precision_aware_optimizer, learner.optimizer_offload
    for name, dtype in (("moments", learner.moments), ("gradients", learner.gradients)):
        if dtype != "fp32" and not aware:
            yield f"learner.{name}={dtype} needs learner.precision_aware_optimizer=true, got false"
    if aware and learner.precision == "fp32":
        yield "learner.precision_aware_optimizer=true needs learner.precision=bf16, got fp32"
    if offload > 0 and learner.precision == "fp32":
        yield f"learner.optimizer_offload={offload:g} needs learner.precision=bf16, got fp32"
    if offload > 0 and learner.moments != "fp32":
        yield (
            f"learner.optimizer_offload={offload:g} updates on the host, where moments are fp32; "
            f"use learner.moments=fp32, got {learner.moments}"
        )


def _overlap(learner: Learner) -> Iterator[str]:
    if learner.bucket_parameters is not None and not learner.overlap_grad_reduce:
        yield (
            f"learner.bucket_parameters={learner.bucket_parameters} has no meaning without "
            "learner.overlap_grad_reduce: Megatron then reduces all gradients at once"
        )


def _megatron(fields: dict[str, Any]) -> Iterator[str]:
    """What would make the training depend on how a batch is cut and packed, and says nothing."""
    for name, value in fields.items():
        if name in _OURS:
            yield f"learner.megatron.{name}={value}: parallel.* and the loss decide this; remove it"
        elif key := _KEYS.get(name):
            yield f"learner.megatron.{name}={value}: say it as {key}, where it is checked"
        elif (why := _DEPENDS_ON_PACKING.get(name)) and value not in (None, 0, "none"):
            yield f"learner.megatron.{name}={value}: {why}; remove it"


def _schedule(learner: Learner, stage: Stage) -> Iterator[str]:
    if learner.warmup_steps > stage.steps:
        yield f"learner.warmup_steps={learner.warmup_steps} exceeds stage.steps={stage.steps}"
    if learner.lr_schedule != "constant" and learner.min_lr > learner.lr:
        yield f"learner.min_lr={learner.min_lr:g} exceeds learner.lr={learner.lr:g}"
