"""Which keys of ``schema.Model`` an architecture has, and what follows from them; no torch."""

from dataclasses import fields

from r1mega.config.schema import Model, RopeScaling

_ANY = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "rms_norm_eps",
    "max_position_embeddings",
    "tie_word_embeddings",
    "initializer_range",
    "eos_token_id",
    "bos_token_id",
)
_DEEPSEEK_V3 = (
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "moe_intermediate_size",
    "first_k_dense_replace",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "routed_scaling_factor",
    "num_nextn_predict_layers",
)
_GROUPED_QUERY = ("num_key_value_heads", "head_dim")

# The plain keys of config.json; the rotary ones are written in several ways there.
KEYS = {
    "deepseek_v3": _ANY + _DEEPSEEK_V3,
    "llama": (*_ANY, *_GROUPED_QUERY, "attention_bias"),
    "qwen2": _ANY + _GROUPED_QUERY,
}
_ROPE_ANY = ("factor", "original_max_position_embeddings")
ROPE_KEYS = {
    "yarn": (*_ROPE_ANY, "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    "llama3": (*_ROPE_ANY, "low_freq_factor", "high_freq_factor"),
}
ROPE_TYPES = {"deepseek_v3": ("yarn",), "llama": ("llama3",), "qwen2": ()}
_ELSEWHERE = {"init", "tokenizer", "architecture", "rope_theta", "rope_scaling", "rope_type"}


def foreign_keys(section: Model | RopeScaling, known: tuple[str, ...]) -> list[str]:
    """Keys that were set although the network has no use for them."""
    return [
        field.name
        for field in fields(section)
        if field.name not in known
        and field.name not in _ELSEWHERE
        and getattr(section, field.name) != field.default
    ]


def is_dense(model: Model) -> bool:
    """Grouped-query attention and no experts, as opposed to DeepSeek-V3's MLA and MoE."""
    return model.architecture != "deepseek_v3"


def num_dense_layers(model: Model) -> int:
    """Leading layers with a dense MLP; the others have experts."""
    return model.num_hidden_layers if is_dense(model) else model.first_k_dense_replace


def key_value_heads(model: Model) -> int:
    """Heads of key and value; each serves num_attention_heads / key_value_heads query heads."""
    return model.num_key_value_heads or model.num_attention_heads


def head_dim(model: Model) -> int:
    """Width of one head of grouped-query attention."""
    return model.head_dim or model.hidden_size // model.num_attention_heads


def has_query_key_value_bias(model: Model) -> bool:
    return model.architecture == "qwen2" or model.attention_bias


def has_attention_output_bias(model: Model) -> bool:
    return model.architecture == "llama" and model.attention_bias
