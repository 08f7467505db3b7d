"""Floating-point operations of a forward pass: pure arithmetic on the network's sizes.

Two per weight that a token meets (its active experts, not all); attention's products are apart, as
they grow with the pairs of tokens. A backward pass costs twice as much: ratios hold for training.
"""

from r1mega.config import network
from r1mega.config.schema import Model


def flops_per_token(model: Model) -> int:
    """All but the products of attention."""
    dense = network.num_dense_layers(model)
    attention = _attention_weights(model)
    feed_forward = 3 * model.hidden_size * model.intermediate_size
    weights = (
        dense * (attention + feed_forward)
        + (model.num_hidden_layers - dense) * (attention + _expert_weights(model))
        + model.hidden_size * model.vocab_size
    )
    return 2 * weights


def flops_per_pair(model: Model) -> int:
    """Of one query and one key in all heads and layers: their product, and the value's share."""
    if network.is_dense(model):
        widths = 2 * network.head_dim(model)
    else:
        widths = model.qk_nope_head_dim + model.qk_rope_head_dim + model.v_head_dim
    return 2 * model.num_hidden_layers * model.num_attention_heads * widths


def crossover_tokens(model: Model) -> int:
    """Length at which a sequence's causal attention, length^2 / 2 pairs, costs as much as the rest.

    A sequence therefore costs in proportion to length * (crossover_tokens + length).
    """
    return max(1, 2 * flops_per_token(model) // flops_per_pair(model))


def _attention_weights(model: Model) -> int:
    """Of one layer's projections."""
    hidden, heads = model.hidden_size, model.num_attention_heads
    if network.is_dense(model):
        return 2 * hidden * network.head_dim(model) * (heads + network.key_value_heads(model))
    query = heads * (model.qk_nope_head_dim + model.qk_rope_head_dim)
    low_rank = model.q_lora_rank
    return (
        (hidden * query if low_rank is None else low_rank * (hidden + query))
        + hidden * (model.kv_lora_rank + model.qk_rope_head_dim)
        + model.kv_lora_rank * heads * (model.qk_nope_head_dim + model.v_head_dim)
        + heads * model.v_head_dim * hidden
    )


def _expert_weights(model: Model) -> int:
    """Of one layer's router, shared experts and the routed experts that one token visits."""
    active = model.num_experts_per_tok + model.n_shared_experts
    return model.hidden_size * (model.n_routed_experts + 3 * active * model.moe_intermediate_size)
