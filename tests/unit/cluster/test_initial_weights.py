"""Weights of another network are refused by name, also where every shape fits."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from r1mega.cluster.initial_weights import check_weights
from r1mega.config.schema import Model
from r1mega.model.hf_config import hf_config
from r1mega.parallel.layout import Layout
from r1mega.weights.checkpoints.checkpoint import Progress, State
from r1mega.weights.names import Spec, hf_shapes
from r1mega.weights.regions import whole
from r1mega.weights.slices import Piece, StoredTensor, checkpoint_index

LLAMA = Model(architecture="llama", num_key_value_heads=2, rope_theta=5e5)
TIED = Model(architecture="qwen2", tie_word_embeddings=True)
MTP = Model(num_nextn_predict_layers=1)

Tensors = dict[str, torch.Tensor]
Edit = Callable[[Tensors], object]


def save(folder: Path, model: Model, edit: Edit = dict, **described: Any) -> None:
    spec = Spec(mtp=model.num_nextn_predict_layers > 0)
    tensors = {n: torch.zeros(s, dtype=torch.bfloat16) for n, s in hf_shapes(model, spec).items()}
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hf_config(model) | described))


@pytest.mark.parametrize("model", [LLAMA, TIED, MTP])
def test_a_folder_of_the_same_network_is_taken(model: Model, tmp_path: Path) -> None:
    save(tmp_path, model, eos_token_id=[1, 2])
    check_weights(tmp_path, replace(model, max_position_embeddings=77), Spec())


def test_what_may_be_left_out(tmp_path: Path) -> None:
    inverse = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    save(tmp_path, TIED, lambda t: t.update(inverse, **{"lm_head.weight": torch.zeros(64, 64)}))
    check_weights(tmp_path, TIED, Spec())


@pytest.mark.parametrize(
    ("described", "sentence"),
    [
        ({"rope_theta": 1e6}, "rope_theta is 1000000.0 there and 500000.0 here"),
        ({"num_attention_heads": 8, "head_dim": 8}, "num_attention_heads is 8 there and 4 here"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05 there and 1e-06 here"),
        ({"model_type": "mistral"}, "config.json has model_type='mistral'; implemented are"),
    ],
)
def test_a_description_that_disagrees_is_named(
    described: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    save(tmp_path, LLAMA, **described)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        check_weights(tmp_path, LLAMA, Spec())


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}),
            "has no 'model.layers.0.self_attn.q_proj.bias': it would be left out",
        ),
        (
            lambda t: t.update({"model.layers.9.mlp.up_proj.weight": torch.zeros(1)}),
            "has no 'model.layers.9.mlp.up_proj.weight'",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(64).to(torch.float8_e4m3fn)}),
            "model.norm.weight is stored as F8_E4M3, which is no weight's",
        ),
        (lambda t: t.pop("model.norm.weight"), "no tensor 'model.norm.weight'"),
    ],
)
def test_the_first_wrong_tensor_is_named(edit: Edit, sentence: str, tmp_path: Path) -> None:
    save(tmp_path, LLAMA, edit)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        check_weights(tmp_path, LLAMA, Spec())


def test_another_architecture_is_one_difference(tmp_path: Path) -> None:
    save(tmp_path, LLAMA)
    with pytest.raises(
        ValueError, match=r"network: model_type is llama there and qwen2 here; take"
    ):
        check_weights(tmp_path, TIED, Spec())


def test_mtp_layers_are_asked_for_only_when_trained(tmp_path: Path) -> None:
    save(tmp_path, replace(MTP, num_nextn_predict_layers=0))
    check_weights(tmp_path, MTP, Spec())
    with pytest.raises(ValueError, match=r"no tensor 'model.layers.4.enorm.weight': it has not"):
        check_weights(tmp_path, MTP, Spec(mtp=True))


def test_a_partial_mtp_layer_is_refused_trained_or_not(tmp_path: Path) -> None:
    save(tmp_path, MTP, lambda t: t.pop("model.layers.4.eh_proj.weight"))
    with pytest.raises(ValueError, match=r"in part only, without 'model.layers.4.eh_proj.weight'"):
        check_weights(tmp_path, MTP, Spec())


def test_a_copy_without_its_description_is_refused(tmp_path: Path) -> None:
    save(tmp_path, LLAMA)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json does not describe a network: Expecting"):
        check_weights(tmp_path, LLAMA, Spec())
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json to say what network it holds"):
        check_weights(tmp_path, LLAMA, Spec())


def test_a_checkpoint_of_ours_says_which_network_it_holds(tmp_path: Path) -> None:
    tensors = {
        name: StoredTensor(shape, (Piece("a", name, whole(shape), "0" * 32),), "F32")
        for name, shape in hf_shapes(LLAMA).items()
    }
    (tmp_path / "index.json").write_text(checkpoint_index(tensors))
    state = State(
        progress=Progress(step=0, data_position=0),
        layout=Layout(world=1),
        spec=Spec(),
        model=LLAMA,
        code="0",
    )
    (tmp_path / "state.json").write_text(state.text())
    check_weights(tmp_path, LLAMA, Spec())
    with pytest.raises(ValueError, match=r"rope_theta is 500000.0 there and 10000.0 here"):
        check_weights(tmp_path, replace(LLAMA, rope_theta=1e4), Spec())
