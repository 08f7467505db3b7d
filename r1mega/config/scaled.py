"""The same configuration in small, for ``r1mega selftest``: pure arithmetic.

What a run computes with stays (architecture and its features, parallel axes, precision, recompute,
dispatcher, loss); sizes shrink to what starts and trains one step in seconds.
"""

from collections.abc import Iterator
from dataclasses import replace
from math import ceil, lcm, prod
from typing import Any

from r1mega.config import derived, network
from r1mega.config.schema import (
    Algorithm,
    Cluster,
    Config,
    Data,
    Learner,
    Model,
    Parallel,
    Rollout,
    Run,
    Stage,
)

_PROMPT_TOKENS, _RESPONSE_TOKENS, _CONTEXT_TOKENS = 64, 24, 96
_POSITIONS = 256
_TOLD = {
    "parallel": "tp pp vpp cp ep etp layers_in_first_stage layers_in_last_stage",
    "model": "num_hidden_layers hidden_size num_attention_heads n_routed_experts",
    "learner": "precision layer_spec dispatcher grouped_gemm fp8 recompute recompute_modules "
    "precision_aware_optimizer moments gradients optimizer_offload",
}
_WITHOUT_ENGINE = ("core_attn", "mla_up_proj", "mlp", "moe", "shared_experts")


def scale_down(config: Config, *, processes: int, cuda: bool, root: str) -> Config:
    """``config`` on one machine with at most ``processes`` learner ranks.

    Without CUDA it computes in fp32, and what needs CUDA gives way to what it replaces.
    """
    parallel, dp = _axes(config, processes)
    parallel, num_layers = _layers(config, parallel)
    world = dp * parallel.tp * parallel.pp * parallel.cp
    # SGLang's kernels want the sizes of real models: on GPUs the engine is left out.
    with_engine = not cuda and config.stage.kind != "sft"
    learner = _learner(config.learner, parallel)
    return Config(
        name="selftest",
        seed=config.seed,
        run=Run(root=root),
        parallel=parallel,
        model=_model(config.model, parallel, num_layers),
        learner=learner if cuda else _on_cpu(learner),
        rollout=_rollout(config.rollout, config.cluster),
        data=Data(template="brief", size=64, difficulty=3, max_prompt_tokens=_PROMPT_TOKENS),
        rewards=replace(config.rewards, math_workers=1),
        algorithm=_algorithm(config.algorithm),
        stage=Stage(kind="rl" if with_engine else "sft", steps=1, save_every=-1),
        cluster=Cluster(
            backend="cuda" if cuda else "cpu",
            learner_processes_per_node=world,
            gpus_per_node=max(world, config.cluster.gpus_per_node),
            collective_timeout_s=config.cluster.collective_timeout_s,
        ),
    )


def changes(before: Config, after: Config) -> Iterator[str]:
    """What became of the layout, the network's size and how it computes, a line each."""
    for section, keys in _TOLD.items():
        old, new = getattr(before, section), getattr(after, section)
        values: list[tuple[str, Any, Any]] = [
            (key, getattr(old, key), getattr(new, key)) for key in keys.split()
        ]
        if section == "parallel":
            was, now = (derived.data_parallel_size(c.cluster, c.parallel) for c in (before, after))
            values.append(("dp", was, now))
        if told := [f"{key} {was} -> {now}" for key, was, now in values if was != now]:
            yield f"{section}: {', '.join(told)}"


def _axes(config: Config, processes: int) -> tuple[Parallel, int]:
    """The largest axis is halved until the ranks fit; two replicas show what more would."""
    p = config.parallel
    dp = derived.data_parallel_size(config.cluster, p)
    sizes = {"dp": min(2, dp), "pp": p.pp, "cp": p.cp, "tp": p.tp}  # of equals the first
    while prod(sizes.values()) > processes:
        axis = max(sizes, key=lambda name: sizes[name])
        sizes[axis] = sizes[axis] // 2 if sizes[axis] > 3 else sizes[axis] - 1
    dp = sizes.pop("dp")
    ranks = dp * sizes["cp"] * sizes["tp"]
    etp = _largest_divisor(ranks, p.etp)
    ep = _largest_divisor(ranks // etp, p.ep)
    return replace(p, **sizes, ep=ep, etp=etp, vpp=p.vpp if sizes["pp"] > 1 else None), dp


def _largest_divisor(number: int, most: int) -> int:
    return max(d for d in range(1, most + 1) if number % d == 0)


def _layers(config: Config, p: Parallel) -> tuple[Parallel, int]:
    """The layout with its uneven stages in small, and how many layers it takes."""
    if p.pp == 1:
        return replace(p, layers_in_first_stage=None, layers_in_last_stage=None), 3
    shortest = min(derived.layers_per_stage(config.model.num_hidden_layers, config.parallel))
    share = (p.vpp or 1) * (2 if p.pp == 2 else 1)

    def small(layers: int | None) -> int | None:
        return None if layers is None else share * (2 if layers > shortest else 1)

    first, last = small(p.layers_in_first_stage), small(p.layers_in_last_stage)
    if p.pp == 2 and first is not None:
        last = None  # it follows
    num_layers = (first or share) + (last or share) + (p.pp - 2) * share
    return replace(p, layers_in_first_stage=first, layers_in_last_stage=last), num_layers


def _model(model: Model, p: Parallel, num_layers: int) -> Model:
    heads = lcm(4, p.tp)
    yarn = model.rope_scaling
    if yarn is not None and yarn.rope_type == "yarn":
        reach = max(8, ceil(_POSITIONS / yarn.factor))
        yarn = replace(yarn, original_max_position_embeddings=reach)
    small = replace(
        model,
        init="random",
        tokenizer="arithmetic",
        vocab_size=16 * heads,
        eos_token_id=1,
        bos_token_id=0,
        hidden_size=16 * heads,
        intermediate_size=32 * heads,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        max_position_embeddings=_POSITIONS,
        rope_scaling=yarn,
        initializer_range=0.08,  # so that layers do something, other than with 0.02
    )
    own = _dense(model, heads) if network.is_dense(model) else _mixture(model, p, num_layers)
    return replace(small, **own)


def _dense(model: Model, heads: int) -> dict[str, Any]:
    grouped = network.key_value_heads(model) < model.num_attention_heads
    return {
        "num_key_value_heads": heads // 2 if grouped else model.num_key_value_heads and heads,
        "head_dim": model.head_dim and 16,
    }


def _mixture(model: Model, p: Parallel, num_layers: int) -> dict[str, Any]:
    limited = model.n_group > 1
    all_dense = model.first_k_dense_replace == model.num_hidden_layers
    return {
        "moe_intermediate_size": 8 * lcm(4, p.tp, p.etp),
        "first_k_dense_replace": num_layers if all_dense else min(1, model.first_k_dense_replace),
        "q_lora_rank": model.q_lora_rank and 32,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": lcm(8, p.ep),
        "n_shared_experts": min(2, model.n_shared_experts),
        "n_group": 4 if limited else 1,
        "topk_group": 2 if limited else 1,
        "num_experts_per_tok": 4 if limited else min(2, model.num_experts_per_tok),
        "num_nextn_predict_layers": min(1, model.num_nextn_predict_layers),
    }


def _learner(learner: Learner, p: Parallel) -> Learner:
    return replace(
        learner,
        lr=1e-2,
        lr_schedule="constant",
        min_lr=0.0,
        warmup_steps=0,
        # Adam moves an entry by lr * sign(gradient), noise or not; with this, noise moves little.
        adam_eps=1e-3,
        tokens_per_microbatch=_CONTEXT_TOKENS,
        logprob_chunk_tokens=16,
        bucket_parameters=learner.bucket_parameters and 20_000,
        dispatcher="alltoall" if p.ep * p.etp == 1 else learner.dispatcher,
    )


def _on_cpu(learner: Learner) -> Learner:
    modules = [name for name in learner.recompute_modules if name in _WITHOUT_ENGINE]
    selective = learner.recompute == "selective"
    return replace(
        learner,
        precision="fp32",  # rounding would hide a difference
        layer_spec="local",
        dispatcher="alltoall" if learner.dispatcher == "flex" else learner.dispatcher,
        grouped_gemm=False,
        fp8="none",
        precision_aware_optimizer=False,
        moments="fp32",
        gradients="fp32",
        optimizer_offload=0.0,
        recompute="none" if selective and not modules else learner.recompute,
        recompute_modules=modules if selective and modules else Learner().recompute_modules,
    )


def _rollout(rollout: Rollout, cluster: Cluster) -> Rollout:
    return replace(
        rollout,
        engine=rollout.engine if cluster.backend == "cpu" else "embedded",
        engines=1,
        steps=1,
        max_response_tokens=_RESPONSE_TOKENS,
        max_response_tokens_later=None,
        later_from_step=None,
        context_tokens=_CONTEXT_TOKENS,
        max_running_requests=16,
        quantization="none",  # its rounding would hide any other difference
        replay=None,
    )


def _algorithm(algorithm: Algorithm) -> Algorithm:
    return replace(
        algorithm,
        prompts_per_step=8,
        group_size=2,
        sequences_per_step=16,
        drop_uniform_groups=False,
        mask_overlong=False,
    )
