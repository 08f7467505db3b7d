"""The range of every single value; constraints between values are in ``checks.py``."""

from collections.abc import Callable, Iterator
from math import inf
from operator import attrgetter

from r1mega.config.schema import Config

_AT_LEAST_ONE = """
    parallel.tp parallel.pp parallel.cp parallel.ep parallel.etp
    parallel.layers_in_first_stage parallel.layers_in_last_stage
    model.vocab_size model.hidden_size model.intermediate_size model.moe_intermediate_size
    model.num_hidden_layers model.num_attention_heads model.num_key_value_heads model.head_dim
    model.q_lora_rank model.kv_lora_rank
    model.qk_nope_head_dim model.qk_rope_head_dim model.v_head_dim model.n_routed_experts
    model.n_shared_experts model.num_experts_per_tok model.n_group model.topk_group
    model.max_position_embeddings model.rope_scaling.factor
    model.rope_scaling.original_max_position_embeddings
    learner.tokens_per_microbatch learner.logprob_chunk_tokens learner.bucket_parameters
    rollout.engines rollout.steps rollout.max_response_tokens rollout.max_response_tokens_later
    rollout.context_tokens rollout.max_running_requests rollout.concurrency rollout.max_retries
    rollout.sync_bucket_mb
    data.size data.difficulty data.max_prompt_tokens rewards.math_workers
    algorithm.prompts_per_step algorithm.sequences_per_step
    stage.steps stage.eval_prompts stage.eval_samples stage.keep_last
    cluster.learner_nodes cluster.learner_processes_per_node cluster.gpus_per_node
"""

_AT_LEAST_ZERO = """
    model.first_k_dense_replace model.num_nextn_predict_layers model.eos_token_id
    model.bos_token_id model.initializer_range
    learner.lr learner.min_lr learner.warmup_steps learner.weight_decay learner.clip_grad
    learner.expert_bias_update_rate learner.mtp_loss_weight
    rollout.later_from_step rollout.max_restarts data.held_out rewards.accuracy rewards.format
    algorithm.clip_low algorithm.clip_high algorithm.kl_coef algorithm.entropy_coef
    algorithm.reference_refresh_steps
    stage.eval_every stage.eval_temperature run.sample_rows
    cluster.engine_nodes cluster.gpus_per_engine
"""

_ABOVE_ZERO = """
    model.rms_norm_eps model.rope_theta model.rope_scaling.low_freq_factor
    model.rope_scaling.high_freq_factor model.routed_scaling_factor learner.adam_eps
    rollout.temperature rollout.request_timeout_s rollout.engine_start_timeout_s
    rollout.engine_silence_timeout_s rollout.probe_tolerance
    rewards.math_timeout_s algorithm.importance_cap cluster.collective_timeout_s
"""

_Range = tuple[str, Callable[[float], bool], str]  # in words, as a test, and whose it is

# Until sizes are sound, no arithmetic on them makes sense. NaN and infinity are in no range.
_SIZES: tuple[_Range, ...] = (
    ("at least 2", lambda v: 2 <= v < inf, "algorithm.group_size parallel.vpp"),
    ("at least 1", lambda v: 1 <= v < inf, _AT_LEAST_ONE),
)
_VALUES: tuple[_Range, ...] = (
    ("at least 0", lambda v: 0 <= v < inf, _AT_LEAST_ZERO),
    ("above 0", lambda v: 0 < v < inf, _ABOVE_ZERO),
    (
        "between 0 and 1",
        lambda v: 0 <= v <= 1,
        "learner.optimizer_offload rewards.max_error_fraction",
    ),
    ("at least 0 and below 1", lambda v: 0 <= v < 1, "learner.adam_beta1 learner.adam_beta2"),
    ("above 0 and at most 1", lambda v: 0 < v <= 1, "rollout.top_p stage.eval_top_p"),
    ("between 0 and 65535", lambda v: 0 <= v <= 65535, "cluster.master_port cluster.router_port"),
    ("at least 1, or -1 for off", lambda v: v == -1 or v >= 1, "rollout.top_k"),
    ("at least 0, or -1 for never", lambda v: v >= -1, "stage.save_every"),
)


def size_violations(config: Config) -> Iterator[str]:
    """Sizes below their minimum."""
    return _outside(config, _SIZES)


def value_violations(config: Config) -> Iterator[str]:
    """Every other value out of its range."""
    return _outside(config, _VALUES)


def _outside(config: Config, ranges: tuple[_Range, ...]) -> Iterator[str]:
    for words, holds, keys in ranges:
        for key, value in _values(config, keys):
            if not holds(value):
                yield f"{key}={value}: must be {words}"


def _values(config: Config, keys: str) -> Iterator[tuple[str, float]]:
    """Each key with its value; a key that is null, or whose section is, has none."""
    for key in keys.split():
        section, _, name = key.rpartition(".")
        holder = attrgetter(section)(config)
        value = None if holder is None else getattr(holder, name)
        if value is not None:
            yield key, value
