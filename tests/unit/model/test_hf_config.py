"""config.json: round trip, transformers' own reading of it, and the published 671B file."""

import json
import os
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

from r1mega.config import load
from r1mega.config.schema import Model, RopeScaling
from r1mega.model.hf_config import hf_config, model_from_hf
from r1mega.weights.names import count_parameters, hf_shapes

DATA = Path(os.environ.get("R1MEGA_DATA", Path(__file__).resolve().parents[4] / "shared/data"))
YARN = RopeScaling(factor=4.0, original_max_position_embeddings=64)
CONFIGS = Path(__file__).parents[3] / "configs/model"
LLAMA3 = RopeScaling(rope_type="llama3", factor=8.0, original_max_position_embeddings=8192)
MODELS = {
    "plain": Model(),
    "yarn": Model(rope_scaling=YARN, rope_theta=5e4),
    "no query rank": Model(q_lora_rank=None, num_nextn_predict_layers=1, bos_token_id=None),
    "llama": Model(architecture="llama", num_key_value_heads=2, head_dim=32, attention_bias=True),
    "llama3": Model(
        architecture="llama", num_key_value_heads=4, rope_theta=5e5, rope_scaling=LLAMA3
    ),
    "qwen2": Model(architecture="qwen2", num_key_value_heads=2, tie_word_embeddings=True),
}
CLASSES = {"deepseek_v3": "DeepseekV3Config", "llama": "LlamaConfig", "qwen2": "Qwen2Config"}
# What their config.json files say, transformers' versions and the like left out.
QWEN_MATH_1_5B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "max_position_embeddings": 4096,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN_MATH_7B = QWEN_MATH_1_5B | {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "vocab_size": 152064,
}
LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_round_trip_through_json(model: Model) -> None:
    assert model_from_hf(json.loads(json.dumps(hf_config(model)))) == model


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_transformers_reads_the_same_network(model: Model, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(hf_config(model)))
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(read).__name__ == CLASSES[model.architecture]
    rope = read.rope_parameters
    assert rope["rope_theta"] == model.rope_theta
    scaling = model.rope_scaling
    assert rope["rope_type"] == ("default" if scaling is None else scaling.rope_type)
    if scaling is not None:
        assert rope["factor"] == scaling.factor
    if model.rope_scaling == YARN:
        assert (rope["mscale"], rope["mscale_all_dim"]) == (1.0, 1.0)
    if model.architecture == "deepseek_v3":
        assert read.num_nextn_predict_layers == model.num_nextn_predict_layers
    saved = model_from_hf(read.to_dict())  # what transformers would write back
    assert saved == model


def test_published_671b_file() -> None:
    path = DATA / "deepseek_v3/hf_config_deepseek_v3_671B.json"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    model = model_from_hf(json.loads(path.read_text()))
    assert (model.num_hidden_layers, model.n_routed_experts, model.vocab_size) == (61, 256, 129280)
    assert model.rope_scaling == RopeScaling()
    assert model.q_lora_rank == 1536
    assert model_from_hf(hf_config(model)) == model


@pytest.mark.parametrize(
    ("file", "published", "parameters"),
    [
        ("qwen2_5_math_1_5b", QWEN_MATH_1_5B, 1_543_714_304),
        ("qwen2_5_math_7b", QWEN_MATH_7B, 7_615_616_512),
        ("llama_3_1_8b", LLAMA_3_1_8B, 8_030_261_248),
    ],
)
def test_published_dense_models(file: str, published: dict[str, object], parameters: int) -> None:
    model = model_from_hf(published)
    assert load([str(CONFIGS / f"{file}.yaml")]).model == model
    assert count_parameters(model) == parameters == sum(map(prod, hf_shapes(model).values()))
    assert model_from_hf(hf_config(model)) == model
    shared = {key for key in published if hasattr(model, key)} - {"rope_scaling"}
    assert {key: getattr(model, key) for key in shared} == {key: published[key] for key in shared}
    assert model.rope_scaling == (LLAMA3 if published is LLAMA_3_1_8B else None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_sliding_window": True}, "use_sliding_window=True, but only use_sliding_window=F"),
        ({"eos_token_id": [5, 6]}, r"eos_token_id=\[5, 6\]: keep the one that ends a response"),
        ({"rope_scaling": {"type": "yarn"}}, "rope type 'yarn'; implemented are 'default'"),
    ],
)
def test_what_a_dense_network_does_not_do_is_refused(
    change: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model_from_hf(QWEN_MATH_7B | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mixtral"}, "model_type='mixtral'; implemented are deepseek_v3, llama, q"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ({"rope_scaling": {"type": "linear"}}, "rope type 'linear'"),
    ],
)
def test_another_network_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_from_hf({**hf_config(Model()), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 64.0}, r"hidden_size=64\.0, but it must be int"),
        ({"intermediate_size": None}, "intermediate_size=None, but it must be int"),
        ({"num_attention_heads": "8"}, "num_attention_heads='8', but it must be int"),
        ({"head_dim": "8"}, "head_dim='8', but it must be int or null"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no', but it must be bool"),
        ({"num_attention_heads": 0}, "num_attention_heads=0: must be at least 1"),
        ({"vocab_size": -5}, "vocab_size=-5: must be at least 1"),
    ],
)
def test_values_that_no_network_has_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"config.json has {message}"):
        model_from_hf(QWEN_MATH_7B | change)


def test_incomplete_config_is_refused() -> None:
    values = hf_config(Model())
    del values["hidden_size"], values["n_group"]
    with pytest.raises(ValueError, match="lacks hidden_size, n_group: it is not that of a deep"):
        model_from_hf(values)


def test_init_and_tokenizer_are_not_part_of_the_network() -> None:
    model = replace(Model(), init="/somewhere", tokenizer="deepseek")
    assert "init" not in hf_config(model)
    assert "tokenizer" not in hf_config(model)
