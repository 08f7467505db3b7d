"""The network's configuration as Hugging Face's config.json, both ways; no torch.

``model_from_hf(hf_config(model)) == model`` but for ``init`` and ``tokenizer``, which are places,
not part of the network. A value that our network does not implement is an error, never ignored.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args, get_type_hints

from r1mega.config import network
from r1mega.config.ranges import size_violations
from r1mega.config.schema import Config, Model, RopeScaling

# What an architecture fixes: engines read these keys, our network has one value each.
_FIXED: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "moe_layer_freq": 1,
        "norm_topk_prob": True,
        "rope_interleave": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    },
    "llama": {"hidden_act": "silu", "attention_dropout": 0.0, "mlp_bias": False},
    "qwen2": {"hidden_act": "silu", "attention_dropout": 0.0, "use_sliding_window": False},
}
_CLASSES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
_OPTIONAL = {
    "num_nextn_predict_layers",
    "tie_word_embeddings",
    "bos_token_id",
    "initializer_range",
    "num_key_value_heads",
    "head_dim",
    "attention_bias",
}
_TYPES = {name: get_args(hint) or (hint,) for name, hint in get_type_hints(Model).items()}

# DeepSeek-V3's form of FP8 weights: weights.fp8.
FP8_QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}


def hf_config(model: Model, *, dtype: str = "float32", quantized: bool = False) -> dict[str, Any]:
    """The content of config.json, as transformers 5 and SGLang 0.5 both read it."""
    values = {name: getattr(model, name) for name in network.KEYS[model.architecture]}
    if network.is_dense(model):
        values["head_dim"] = network.head_dim(model)
    else:
        values["ep_size"] = 1
    scaling = _scaling_values(model.rope_scaling)
    return {
        "architectures": [_CLASSES[model.architecture]],
        "model_type": model.architecture,
        **_FIXED[model.architecture],
        **values,
        "num_key_value_heads": network.key_value_heads(model),
        # SGLang and published checkpoints have the first two keys, transformers 5 the third.
        "rope_theta": model.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {
            "rope_theta": model.rope_theta,
            **(scaling or {"rope_type": "default"}),
        },
        "torch_dtype": dtype,
        "dtype": dtype,
        "use_cache": True,
        **({"quantization_config": FP8_QUANTIZATION} if quantized else {}),
    }


def generation_config(model: Model) -> dict[str, Any]:
    """The content of generation_config.json: where a response begins and ends."""
    return {
        "_from_model_config": True,
        "bos_token_id": model.bos_token_id,
        "eos_token_id": model.eos_token_id,
    }


def model_from_hf(values: dict[str, Any]) -> Model:
    """The network described by a config.json of one of the implemented architectures.

    Raises ValueError with a sentence for any other, and for values that no network can have.
    """
    architecture = values.get("model_type")
    if architecture not in network.KEYS:
        raise ValueError(
            f"config.json has model_type={architecture!r}; implemented are "
            f"{', '.join(network.KEYS)}"
        )
    for key, expected in _FIXED[architecture].items():
        if values.get(key, expected) != expected:
            raise ValueError(
                f"config.json has {key}={values[key]!r}, but only {key}={expected!r} is "
                f"implemented for {architecture}"
            )
    keys = network.KEYS[architecture]
    if missing := sorted(set(keys) - _OPTIONAL - values.keys()):
        raise ValueError(
            f"config.json lacks {', '.join(missing)}: it is not that of a {architecture} model"
        )
    if not isinstance(values["eos_token_id"], int):
        raise ValueError(
            f"config.json has eos_token_id={values['eos_token_id']!r}: keep the one that ends a "
            "response"
        )
    rope = values.get("rope_parameters") or {}
    theta = values.get("rope_theta", rope.get("rope_theta", Model().rope_theta))
    chosen = {name: values[name] for name in keys if name in values}
    _check_types(chosen)
    if (chosen.get("head_dim") or 0) * chosen["num_attention_heads"] == chosen["hidden_size"]:
        chosen.pop("head_dim", None)  # transformers writes it even where it is the quotient
    model = Model(
        **chosen,
        architecture=architecture,
        rope_theta=float(theta),
        rope_scaling=_rope_scaling(architecture, values.get("rope_scaling") or rope),
    )
    if wrong := next(size_violations(Config(model=model)), None):
        raise ValueError(f"config.json has {wrong.removeprefix('model.')}")
    return model


def _check_types(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        types = _TYPES[name]
        if type(value) not in types and not (float in types and type(value) is int):
            names = " or ".join("null" if t is type(None) else t.__name__ for t in types)
            raise ValueError(f"config.json has {name}={value!r}, but it must be {names}")


def _scaling_values(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    kind = scaling.rope_type
    numbers = {name: getattr(scaling, name) for name in network.ROPE_KEYS[kind]}
    return {"type": kind, "rope_type": kind, **numbers}


def _rope_scaling(architecture: str, values: dict[str, Any]) -> RopeScaling | None:
    kind = values.get("rope_type", values.get("type", "default"))
    if kind == "default":
        return None
    kinds = network.ROPE_TYPES[architecture]
    if kind not in kinds:
        implemented = " and ".join(repr(k) for k in (*kinds, "default"))
        raise ValueError(f"config.json has rope type {kind!r}; implemented are {implemented}")
    numbers: dict[str, Any] = {
        field.name: (int if field.type is int else float)(values[field.name])
        for field in fields(RopeScaling)
        if field.name in network.ROPE_KEYS[kind] and field.name in values
    }
    return RopeScaling(rope_type=kind, **numbers)
