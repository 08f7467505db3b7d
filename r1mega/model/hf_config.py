"""The network's configuration as Hugging Face's config.json, both ways; no torch.

``model_from_hf(hf_config(model)) == model`` but for ``init`` and ``tokenizer``, which are places,
not part of the network. A value that our network does not implement is an error, never ignored.
"""

from dataclasses import asdict, fields
from typing import Any

from r1mega.config.schema import Model, RopeScaling

# What DeepSeek-V3 fixes: SGLang and transformers read these keys, our network has one value each.
_FIXED: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
_ELSEWHERE = {"init", "tokenizer", "architecture", "rope_theta", "rope_scaling"}
_OPTIONAL = {"num_nextn_predict_layers", "tie_word_embeddings", "bos_token_id", "initializer_range"}
_SHARED = tuple(field.name for field in fields(Model) if field.name not in _ELSEWHERE)


def hf_config(model: Model, *, dtype: str = "float32") -> dict[str, Any]:
    """The content of config.json, as transformers 5 and SGLang 0.5 both read it."""
    scaling = None if model.rope_scaling is None else asdict(model.rope_scaling)
    yarn = None if scaling is None else {"type": "yarn", "rope_type": "yarn", **scaling}
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        **_FIXED,
        **{name: getattr(model, name) for name in _SHARED},
        "num_key_value_heads": model.num_attention_heads,
        "ep_size": 1,
        # SGLang and the published checkpoint have the first two keys, transformers 5 the third.
        "rope_theta": model.rope_theta,
        "rope_scaling": yarn,
        "rope_parameters": {"rope_theta": model.rope_theta, **(yarn or {"rope_type": "default"})},
        "torch_dtype": dtype,
        "dtype": dtype,
        "use_cache": True,
    }


def model_from_hf(values: dict[str, Any]) -> Model:
    """The network described by a config.json of DeepSeek-V3's form."""
    for key, expected in _FIXED.items():
        if values.get(key, expected) != expected:
            raise ValueError(
                f"config.json has {key}={values[key]!r}, but only {key}={expected!r} is "
                "implemented: use a model of DeepSeek-V3's form"
            )
    required = {"model_type", *_SHARED} - _OPTIONAL
    missing = sorted(required - values.keys())
    if missing:
        raise ValueError(
            f"config.json lacks {', '.join(missing)}: it is not that of a DeepSeek-V3 model"
        )
    rope = values.get("rope_parameters") or {}
    theta = values.get("rope_theta", rope.get("rope_theta", Model().rope_theta))
    return Model(
        **{name: values[name] for name in _SHARED if name in values},
        rope_theta=float(theta),
        rope_scaling=_rope_scaling(values.get("rope_scaling") or rope),
    )


def _rope_scaling(values: dict[str, Any]) -> RopeScaling | None:
    kind = values.get("rope_type", values.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise ValueError(
            f"config.json has rope type {kind!r}; implemented are 'yarn' and 'default'"
        )
    numbers: dict[str, Any] = {
        field.name: (int if field.type is int else float)(values[field.name])
        for field in fields(RopeScaling)
        if field.name in values
    }
    return RopeScaling(**numbers)
