"""Constraints on the network alone, and between it and how it is cut and trained."""

from collections.abc import Iterator

from r1mega.config import network
from r1mega.config.schema import Learner, Model, Parallel


def network_violations(m: Model, p: Parallel, learner: Learner) -> Iterator[str]:
    """One sentence for each; sizes are at least 1."""
    yield from _architecture(m)
    yield from _tensor_cuts(m, p)
    if network.is_dense(m):
        yield from _grouped_query(m, p)
        yield from _no_experts(m, p, learner)
    else:
        yield from _experts(m, p)
        yield from _latent_attention(m, p)
        if learner.mtp_loss_weight > 0:
            yield from _mtp(m, p, f"learner.mtp_loss_weight={learner.mtp_loss_weight:g}")
    yield from _positions(m)


def _architecture(m: Model) -> Iterator[str]:
    """A key that the network does not have would be ignored without a word."""
    if keys := network.foreign_keys(m, network.KEYS[m.architecture]):
        values = ", ".join(f"model.{key}={getattr(m, key)}" for key in keys)
        yield (
            f"{values}: architecture {m.architecture} does not have this; unset it (two model "
            "layers do not mix)"
        )
    scaling = m.rope_scaling
    if scaling is None:
        return
    kinds = network.ROPE_TYPES[m.architecture]
    if scaling.rope_type not in kinds:
        yield (
            f"model.rope_scaling.rope_type={scaling.rope_type} is not implemented for "
            f"{m.architecture}, only {' or '.join(kinds) or 'none'}; unset model.rope_scaling"
        )
        return
    for key in network.foreign_keys(scaling, network.ROPE_KEYS[scaling.rope_type]):
        value = getattr(scaling, key)
        yield f"model.rope_scaling.{key}={value:g}: {scaling.rope_type} has no such key; unset it"
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        yield (
            f"model.rope_scaling.high_freq_factor={scaling.high_freq_factor:g} must be above "
            f"low_freq_factor={scaling.low_freq_factor:g}"
        )


def _tensor_cuts(m: Model, p: Parallel) -> Iterator[str]:
    """What one tensor-parallel rank holds must be whole."""
    cuts = [
        ("num_attention_heads", m.num_attention_heads, "tp", p.tp),
        ("vocab_size", m.vocab_size, "tp", p.tp),
        ("intermediate_size", m.intermediate_size, "tp", p.tp),
    ]
    if not network.is_dense(m):
        shared = m.n_shared_experts * m.moe_intermediate_size
        cuts += [
            ("n_shared_experts * moe_intermediate_size", shared, "tp", p.tp),
            ("moe_intermediate_size", m.moe_intermediate_size, "etp", p.etp),
        ]
    for name, size, axis, parts in cuts:
        if size % parts:
            yield f"{axis}={parts} must divide model.{name}={size}; change parallel.{axis}"


def _grouped_query(m: Model, p: Parallel) -> Iterator[str]:
    heads, groups = m.num_attention_heads, network.key_value_heads(m)
    if m.head_dim is None and m.hidden_size % heads:
        yield (
            f"model.num_attention_heads={heads} must divide hidden_size={m.hidden_size}; or name "
            "model.head_dim"
        )
        return
    if network.head_dim(m) % 2:
        yield (
            f"a head of {network.head_dim(m)} channels must be even, as RoPE turns pairs; change "
            "model.head_dim"
        )
    if heads % groups:
        yield f"model.num_key_value_heads={groups} must divide num_attention_heads={heads}"
    # Ranks beyond the key-value heads share one, so each of them needs an equal part of a group.
    elif groups % p.tp and (p.tp % groups or heads % p.tp):
        yield (
            f"tp={p.tp} must divide model.num_key_value_heads={groups}, or be a multiple of it "
            f"that divides num_attention_heads={heads}; change parallel.tp"
        )
    elif (rows := (heads + 2 * groups) * network.head_dim(m)) % p.tp:
        yield f"tp={p.tp} must divide the {rows} rows of query, key and value; change parallel.tp"


def _no_experts(m: Model, p: Parallel, learner: Learner) -> Iterator[str]:
    """What concerns experts has no meaning in a dense network."""
    for setting, is_set in (
        (f"parallel.ep={p.ep}", p.ep > 1),
        (f"parallel.etp={p.etp}", p.etp > 1),
        (f"learner.dispatcher={learner.dispatcher}", learner.dispatcher != "alltoall"),
        ("learner.grouped_gemm=true", learner.grouped_gemm),
        (
            f"learner.expert_bias_update_rate={learner.expert_bias_update_rate:g}",
            learner.expert_bias_update_rate > 0,
        ),
        (f"learner.mtp_loss_weight={learner.mtp_loss_weight:g}", learner.mtp_loss_weight > 0),
    ):
        if is_set:
            yield f"{setting} has no meaning for {m.architecture}; unset it"
    if m.attention_bias and learner.layer_spec == "transformer_engine":
        yield "model.attention_bias=true needs learner.layer_spec=local, got transformer_engine"


def _experts(m: Model, p: Parallel) -> Iterator[str]:
    if m.first_k_dense_replace > m.num_hidden_layers:
        yield (
            f"model.first_k_dense_replace={m.first_k_dense_replace} exceeds "
            f"num_hidden_layers={m.num_hidden_layers}"
        )
    if m.n_routed_experts % p.ep:
        yield (
            f"ep={p.ep} must divide model.n_routed_experts={m.n_routed_experts}; change parallel.ep"
        )
    if m.n_routed_experts % m.n_group:
        yield f"model.n_group={m.n_group} must divide n_routed_experts={m.n_routed_experts}"
        return
    group = m.n_routed_experts // m.n_group
    if m.topk_group > m.n_group:
        yield f"model.topk_group={m.topk_group} exceeds n_group={m.n_group}"
    elif m.num_experts_per_tok > m.topk_group * group:
        yield (
            f"model.num_experts_per_tok={m.num_experts_per_tok} exceeds the {m.topk_group * group} "
            f"experts of topk_group={m.topk_group} groups of {group}"
        )
    if m.num_experts_per_tok == 1:
        yield (
            "model.num_experts_per_tok=1: megatron-core does not normalize the score of a single "
            "expert, as Hugging Face and SGLang do; use at least 2"
        )
    # With one group nothing is limited; otherwise Megatron scores a group by its top
    # num_experts_per_tok / topk_group experts, Hugging Face and SGLang by its top 2.
    if m.n_group > 1 and m.num_experts_per_tok != 2 * m.topk_group:
        yield (
            f"model.topk_group={m.topk_group} must be half of "
            f"num_experts_per_tok={m.num_experts_per_tok}, or learner and engines route differently"
        )
    if m.n_group > 1 and group < 2:
        yield f"model.n_group={m.n_group} leaves {group} expert in a group; the router scores 2"


def _latent_attention(m: Model, p: Parallel) -> Iterator[str]:
    if m.qk_rope_head_dim % 2:
        yield f"model.qk_rope_head_dim={m.qk_rope_head_dim} must be even: RoPE turns pairs"
    yarn = m.rope_scaling
    if yarn is not None and p.cp > 1 and yarn.original_max_position_embeddings % (2 * p.cp):
        yield (
            f"cp={p.cp}: megatron-core cuts YaRN's table of model.rope_scaling."
            f"original_max_position_embeddings={yarn.original_max_position_embeddings} positions "
            f"in {2 * p.cp} equal chunks; use a cp whose double divides it"
        )


def _mtp(m: Model, p: Parallel, setting: str) -> Iterator[str]:
    if m.num_nextn_predict_layers == 0:
        yield f"{setting} needs MTP layers, but model.num_nextn_predict_layers=0"
    if m.tie_word_embeddings:
        yield f"{setting} needs model.tie_word_embeddings=false, got true"
    if p.cp > 1:
        yield f"{setting} needs parallel.cp=1, got {p.cp}"


def _positions(m: Model) -> Iterator[str]:
    for name, token in (("eos_token_id", m.eos_token_id), ("bos_token_id", m.bos_token_id)):
        if token is not None and token >= m.vocab_size:
            yield f"model.{name}={token} is outside vocab_size={m.vocab_size}"
    scaling = m.rope_scaling
    if scaling is None or scaling.rope_type != "yarn":
        return
    reach = int(scaling.factor * scaling.original_max_position_embeddings)
    if m.max_position_embeddings > reach:
        yield (
            f"model.max_position_embeddings={m.max_position_embeddings} exceeds YaRN's reach of "
            f"{reach} (factor={scaling.factor:g} * "
            f"original_max_position_embeddings={scaling.original_max_position_embeddings})"
        )
