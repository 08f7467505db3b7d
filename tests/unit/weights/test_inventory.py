"""What a folder may hold, and how each thing that it must not hold is named."""

import re
from collections.abc import Callable

import pytest

from r1mega.config import schema
from r1mega.parallel.layout import Layout
from r1mega.weights.inventory import take_inventory
from r1mega.weights.names import Spec, fp8_weights, hf_shapes
from r1mega.weights.regions import partition_fault, volume
from r1mega.weights.slices import StoredTensor

MTP = schema.Model(num_nextn_predict_layers=1, hidden_size=160)
TIED = schema.Model(architecture="qwen2", tie_word_embeddings=True)
PUBLISHED = Spec(mtp=True, mtp_copies=True)

Stored = dict[str, StoredTensor]


def folder(model: schema.Model, spec: Spec = Spec(), *, fp8: bool = False) -> Stored:
    quantized = fp8_weights(model, spec) if fp8 else frozenset()
    stored = {}
    for name, shape in hf_shapes(model, spec).items():
        stored[name] = StoredTensor(shape, (), "F8_E4M3" if name in quantized else "BF16")
        if name in quantized:
            blocks = tuple(-(-size // 128) for size in shape)
            stored[name + "_scale_inv"] = StoredTensor(blocks, (), "F32")
    return stored


def test_an_fp8_folder_with_mtp_as_published() -> None:
    stored = folder(MTP, PUBLISHED, fp8=True)
    inventory = take_inventory(MTP, dict(sorted(stored.items())), "folder")
    assert list(inventory.shapes) == list(stored)  # in forward order, whatever order it came in
    assert inventory.shapes == {name: tensor.shape for name, tensor in stored.items()}
    assert inventory.mtp
    assert inventory.quantized == fp8_weights(MTP, PUBLISHED)
    assert "model.layers.4.eh_proj.weight" not in inventory.quantized
    assert "model.layers.4.self_attn.o_proj.weight" in inventory.quantized
    held = inventory.holders(MTP, Layout(world=4, tp=2, ep=4))
    assert list(held) == list(stored)
    for name, tensor in held.items():
        assert tensor.shape == stored[name].shape
        assert partition_fault(tensor.shape, [region for region, _ in tensor.parts]) is None
        assert all(volume(region) for region, _ in tensor.parts)


def test_what_may_be_absent_or_spare() -> None:
    assert not take_inventory(MTP, folder(MTP), "folder").mtp
    without_copies = folder(MTP, Spec(mtp=True))
    assert take_inventory(MTP, without_copies, "folder").shapes.keys() == without_copies.keys()
    spare = {
        "lm_head.weight": StoredTensor((64, 64), (), "BF16"),
        "model.layers.0.self_attn.rotary_emb.inv_freq": StoredTensor((8,), (), "F32"),
    }
    assert take_inventory(TIED, folder(TIED) | spare, "folder").shapes == hf_shapes(TIED)


def put(name: str, shape: tuple[int, ...], dtype: str) -> Callable[[Stored], object]:
    return lambda stored: stored.update({name: StoredTensor(shape, (), dtype)})


def drop(*endings: str) -> Callable[[Stored], object]:
    return lambda s: [s.pop(name) for name in list(s) if name.endswith(endings)]


NORM, O_PROJ = "model.norm.weight", "model.layers.0.self_attn.o_proj.weight"


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (drop(NORM), f"here: no tensor '{NORM}'; is this"),
        (drop("layernorm.weight"), "no tensor 'model.layers.0.input_layernorm.weight', 'model.lay"),
        (drop("layernorm.weight"), "'model.layers.0.self_attn.kv_a_layernorm.weight' and 13 more"),
        (put("model.x", (1,), "F32"), "has no 'model.x': it would be left out"),
        (put(NORM, (3,), "BF16"), f"{NORM} has shape [3] but the model wants [160]"),
        (put(NORM, (160,), "I64"), f"{NORM} is stored as I64, which is no weight's"),
        (put(NORM, (160,), "F8_E4M3"), f"{NORM} is stored as F8_E4M3, which is no weight's"),
        (drop("4.eh_proj.weight"), "there in part only, without 'model.layers.4.eh_proj.weight'"),
        (drop(O_PROJ + "_scale_inv"), f"without their scales '{O_PROJ}_scale_inv'"),
        (
            put(O_PROJ, (160, 64), "BF16"),
            f"'{O_PROJ}_scale_inv' are scales of weights that are not",
        ),
        (put(O_PROJ + "_scale_inv", (3, 1), "F32"), f"{O_PROJ}_scale_inv has shape [3, 1] but the"),
        (put(O_PROJ + "_scale_inv", (2, 1), "BF16"), f"{O_PROJ}_scale_inv is stored as BF16"),
    ],
)
def test_what_is_wrong_is_named(edit: Callable[[Stored], object], sentence: str) -> None:
    stored = folder(MTP, PUBLISHED, fp8=True)
    edit(stored)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        take_inventory(MTP, stored, "here")


def test_copies_alone_are_no_mtp_layer() -> None:
    copy = StoredTensor((64, 160), (), "F32")
    stored = folder(MTP) | {"model.layers.4.embed_tokens.weight": copy}
    with pytest.raises(
        ValueError, match=r"in part only, without 'model\.layers\.4\.enorm\.weight'"
    ):
        take_inventory(MTP, stored, "here")
