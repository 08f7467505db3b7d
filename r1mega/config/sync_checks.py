"""Constraints on how weights reach the engines."""

from collections.abc import Iterator

from r1mega.config import network
from r1mega.config.schema import Config, Model

_BLOCK = 128  # of DeepSeek-V3's FP8 weights, both ways


def sync_violations(config: Config) -> Iterator[str]:
    """One sentence for each."""
    if config.rollout.quantization == "fp8":
        yield from _fp8(config)


def _fp8(config: Config) -> Iterator[str]:
    model, rollout, parallel = config.model, config.rollout, config.parallel
    if network.is_dense(model):
        yield (
            f"rollout.quantization=fp8 is DeepSeek-V3's form of its own weights; "
            f"{model.architecture} engines take none of it: use none"
        )
        return
    if rollout.engine == "sglang":
        yield from _undivided("rollout.quantization=fp8 on sglang", _widths(model))
        tp = config.cluster.gpus_per_engine or 1
        yield from _uncut(f"cluster.gpus_per_engine={tp}", _cuts(model), tp)
    if rollout.sync != "broadcast":  # every learner rank quantizes what it holds
        yield from _uncut(
            f"rollout.sync={rollout.sync} and tp={parallel.tp}", _cuts(model), parallel.tp
        )
        experts = {"moe_intermediate_size": model.moe_intermediate_size}
        yield from _uncut(
            f"rollout.sync={rollout.sync} and etp={parallel.etp}", experts, parallel.etp
        )


def _widths(m: Model) -> dict[str, int]:
    """What SGLang's kernels read in whole blocks."""
    widths = {
        "hidden_size": m.hidden_size,
        "intermediate_size": m.intermediate_size,
        "moe_intermediate_size": m.moe_intermediate_size,
        "kv_lora_rank": m.kv_lora_rank,
        "num_attention_heads * v_head_dim": m.num_attention_heads * m.v_head_dim,
    }
    return widths if m.q_lora_rank is None else {**widths, "q_lora_rank": m.q_lora_rank}


def _cuts(m: Model) -> dict[str, int]:
    """What tensor parallelism cuts."""
    heads = m.num_attention_heads
    return {
        "num_attention_heads * (qk_nope_head_dim + qk_rope_head_dim)": heads
        * (m.qk_nope_head_dim + m.qk_rope_head_dim),
        "num_attention_heads * (qk_nope_head_dim + v_head_dim)": heads
        * (m.qk_nope_head_dim + m.v_head_dim),
        "num_attention_heads * v_head_dim": heads * m.v_head_dim,
        "intermediate_size": m.intermediate_size,
        "n_shared_experts * moe_intermediate_size": m.n_shared_experts * m.moe_intermediate_size,
    }


def _undivided(cause: str, widths: dict[str, int]) -> Iterator[str]:
    for name, width in widths.items():
        if width % _BLOCK:
            yield f"{cause} wants whole blocks of {_BLOCK}, but model.{name} is {width}: use none"


def _uncut(cause: str, widths: dict[str, int], ways: int) -> Iterator[str]:
    for name, width in widths.items():
        if ways > 1 and width % (ways * _BLOCK):
            yield (
                f"rollout.quantization=fp8 with {cause} cuts {name} = {width} in {ways} parts that "
                f"are no whole blocks of {_BLOCK}: use fewer, or rollout.quantization=none"
            )
