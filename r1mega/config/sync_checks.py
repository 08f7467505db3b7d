"""Constraints on how weights reach the engines, and on who else could send them some."""

from collections.abc import Iterator
from ipaddress import ip_address

from r1mega.config import network
from r1mega.config.schema import Config, Model

_BLOCK = 128  # of DeepSeek-V3's FP8 weights, both ways
_KEY_ADVICE = "set the environment variable R1MEGA_API_KEY, which no file or process list shows"
_LAUNCHERS_FLAGS = {  # of sglang.launch_server, and what to do instead
    "--host": "set cluster.host",
    "--port": "every engine gets a free one",
    "--model-path": "set model.init",
    "--config": "list its options",
    "--api-key": _KEY_ADVICE,
    "--admin-api-key": _KEY_ADVICE,
    "--custom-weight-loader": "set rollout.sync",
}


def sync_violations(config: Config) -> Iterator[str]:
    """One sentence for each."""
    if config.rollout.engine == "sglang":
        yield from _flags(config.rollout.sglang_args)
    if config.rollout.sync == "p2p":
        yield from _p2p(config)
    if config.rollout.quantization == "fp8":
        yield from _fp8(config)


def _flags(arguments: list[str]) -> Iterator[str]:
    """Later ones win: another host, say, would open all routes to it without a key."""
    given = {argument.partition("=")[0] for argument in arguments}
    for flag, advice in _LAUNCHERS_FLAGS.items():
        if flag in given:
            yield f"rollout.sglang_args has {flag}, which the launcher gives: {advice}"


def _p2p(config: Config) -> Iterator[str]:
    rollout, host = config.rollout, config.cluster.host
    if rollout.engine == "sglang" and _is_public(host):
        yield (
            f"rollout.sync=p2p opens a route of SGLang that reads pickles, and cluster.host={host} "
            "is a public address: name one of a private network, or use rollout.sync=broadcast"
        )
    if rollout.engine == "embedded" and rollout.quantization == "fp8":
        yield (
            "rollout.sync=p2p writes slices into the embedded engine's float32 weights as they "
            "are: use rollout.quantization=none, or rollout.sync=broadcast"
        )


def _is_public(host: str) -> bool:
    """A name may be anything: it is taken for one of the own network."""
    try:
        return ip_address(host).is_global
    except ValueError:
        return False


def _fp8(config: Config) -> Iterator[str]:
    model, rollout, parallel = config.model, config.rollout, config.parallel
    if network.is_dense(model):
        yield (
            "rollout.quantization=fp8 is the form of DeepSeek-V3's weights, not of "
            f"{model.architecture}'s; use none"
        )
        return
    if rollout.engine == "sglang":
        yield from _undivided(_widths(model))
    if rollout.sync != "broadcast":  # every learner rank quantizes what it holds
        yield from _uncut(rollout.sync, "tp", parallel.tp, _cuts(model))
        experts = {"moe_intermediate_size": model.moe_intermediate_size}
        yield from _uncut(rollout.sync, "etp", parallel.etp, experts)


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


def _undivided(widths: dict[str, int]) -> Iterator[str]:
    for name, width in widths.items():
        if width % _BLOCK:
            yield (
                f"rollout.quantization=fp8: SGLang wants whole blocks of {_BLOCK}, but {name} is "
                f"{width}; use none"
            )


def _uncut(sync: str, axis: str, size: int, widths: dict[str, int]) -> Iterator[str]:
    for name, width in widths.items():
        if width % (size * _BLOCK) and size > 1:
            yield (
                f"rollout.quantization=fp8 with rollout.sync={sync}: {axis}={size} cuts {name} = "
                f"{width} inside a block of {_BLOCK}; use sync=broadcast, or quantization=none"
            )
