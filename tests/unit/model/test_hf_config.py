"""config.json: round trip, transformers' own reading of it, and the published 671B file."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from r1mega.config.schema import Model, RopeScaling
from r1mega.model.hf_config import hf_config, model_from_hf

DATA = Path(os.environ.get("R1MEGA_DATA", Path(__file__).resolve().parents[4] / "shared/data"))
YARN = RopeScaling(factor=4.0, original_max_position_embeddings=64)
MODELS = {
    "plain": Model(),
    "yarn": Model(rope_scaling=YARN, rope_theta=5e4),
    "no query rank": Model(q_lora_rank=None, num_nextn_predict_layers=1, bos_token_id=None),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_round_trip_through_json(model: Model) -> None:
    assert model_from_hf(json.loads(json.dumps(hf_config(model)))) == model


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_transformers_reads_the_same_network(model: Model, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(hf_config(model)))
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(read).__name__ == "DeepseekV3Config"
    rope = read.rope_parameters
    assert rope["rope_theta"] == model.rope_theta
    assert rope["rope_type"] == ("default" if model.rope_scaling is None else "yarn")
    if model.rope_scaling is not None:
        assert (rope["factor"], rope["mscale"], rope["mscale_all_dim"]) == (4.0, 1.0, 1.0)
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
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type='llama', but only model_type='deepseek_v3'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ({"rope_scaling": {"type": "linear"}}, "rope type 'linear'"),
    ],
)
def test_another_network_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_from_hf({**hf_config(Model()), **change})


def test_incomplete_config_is_refused() -> None:
    values = hf_config(Model())
    del values["hidden_size"], values["n_group"]
    with pytest.raises(ValueError, match="lacks hidden_size, n_group: it is not that of a Deep"):
        model_from_hf(values)


def test_init_and_tokenizer_are_not_part_of_the_network() -> None:
    model = replace(Model(), init="/somewhere", tokenizer="deepseek")
    assert "init" not in hf_config(model)
    assert "tokenizer" not in hf_config(model)
