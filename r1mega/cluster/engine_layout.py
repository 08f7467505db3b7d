"""How a configuration spreads one engine over its ranks: what weights are cut by for it."""

import argparse

from r1mega.config.schema import Config
from r1mega.weights.engine_names import EngineLayout


def engine_layout(config: Config) -> EngineLayout:
    """Of every engine of a job. Raises ValueError for sizes that contradict each other."""
    quantized = config.rollout.quantization == "fp8"
    if config.rollout.engine == "embedded":
        return EngineLayout(quantized=quantized, fused=False)
    flags = _flags(config.rollout.sglang_args)
    gpus = config.cluster.gpus_per_engine if config.cluster.backend == "cuda" else 1
    tp = flags.tp_size or gpus
    exchanges_tokens = flags.moe_a2a_backend != "none"
    return EngineLayout(
        tp=tp,
        ep=tp if exchanges_tokens else flags.ep_size,
        dp=flags.dp_size if flags.enable_dp_attention else flags.attn_dp_size,
        quantized=quantized,
        dense_replicated=flags.moe_dense_tp_size == 1,
        shared_replicated=exchanges_tokens,
        dp_head=flags.enable_dp_lm_head,
    )


def _flags(arguments: list[str]) -> argparse.Namespace:
    """Those of sglang.launch_server (0.5.23) that say which rank holds what."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add = parser.add_argument
    add("--tp-size", "--tensor-parallel-size", "--tp", type=int)
    add("--ep-size", "--expert-parallel-size", "--ep", type=int, default=1)
    add("--dp-size", "--data-parallel-size", "--dp", type=int, default=1)
    add("--attn-dp-size", "--attention-data-parallel-size", type=int, default=1)
    add("--moe-dense-tp-size", type=int)
    add("--moe-a2a-backend", default="none")
    add("--enable-dp-attention", action="store_true")
    add("--enable-dp-lm-head", action="store_true")
    return parser.parse_known_args(arguments)[0]
