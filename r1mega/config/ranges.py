"""The range of every single value; constraints between values are in ``checks.py``."""

import math
from collections.abc import Iterator
from operator import attrgetter

from r1mega.config.schema import Config

_AT_LEAST_TWO = """algorithm.group_size parallel.vpp"""

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
    rollout.engine_silence_timeout_s
    rewards.math_timeout_s algorithm.importance_cap cluster.collective_timeout_s
"""

_BETWEEN = {
    "learner.adam_beta1 learner.adam_beta2 learner.optimizer_offload": (0, 1),
    "rewards.max_error_fraction": (0, 1),
    "cluster.master_port cluster.router_port": (0, 65535),
}


def size_violations(config: Config) -> Iterator[str]:
    """Sizes below their minimum: until they are sound, no arithmetic on them makes sense."""
    yield from _at_least(config, 2, _AT_LEAST_TWO)
    yield from _at_least(config, 1, _AT_LEAST_ONE)


def value_violations(config: Config) -> Iterator[str]:
    """Every other value out of its range; NaN and infinity are out of every range."""
    yield from _at_least(config, 0, _AT_LEAST_ZERO)
    for key, value in _values(config, _ABOVE_ZERO):
        if not 0 < value < math.inf:
            yield f"{key}={value}: must be above 0"
    for keys, (low, high) in _BETWEEN.items():
        for key, value in _values(config, keys):
            if not low <= value <= high:
                yield f"{key}={value}: must be between {low} and {high}"
    for key, value in _values(config, "rollout.top_p stage.eval_top_p"):
        if not 0 < value <= 1:
            yield f"{key}={value}: must be above 0 and at most 1"
    if config.rollout.top_k != -1 and config.rollout.top_k < 1:
        yield f"rollout.top_k={config.rollout.top_k}: must be at least 1, or -1 for off"
    if config.stage.save_every < -1:
        yield f"stage.save_every={config.stage.save_every}: must be at least 0, or -1 for never"


def _at_least(config: Config, minimum: int, keys: str) -> Iterator[str]:
    for key, value in _values(config, keys):
        if not minimum <= value < math.inf:
            yield f"{key}={value}: must be at least {minimum}"


def _values(config: Config, keys: str) -> Iterator[tuple[str, float]]:
    """Each key with its value; a key that is null, or whose section is, has none."""
    for key in keys.split():
        section, _, name = key.rpartition(".")
        holder = attrgetter(section)(config)
        value = None if holder is None else getattr(holder, name)
        if value is not None:
            yield key, value
