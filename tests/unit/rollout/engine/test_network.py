"""The network equals transformers' on the same weights."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from r1mega.rollout.engine.cache import Cache
from r1mega.rollout.engine.network import Network
from r1mega.rollout.engine.plan import Chunks, plan
from r1mega.rollout.engine.weights import allocate, check_names, checksums, load, load_folder
from tests.unit.rollout.engine.tools import MODELS

NUM_TOKENS = 150
CHUNKS = (1, 7, 50, 64, 3, 1, 1, 1, 22)


@pytest.mark.parametrize("kind", MODELS)
def test_logits_of_chunked_prefill_and_decode_equal_transformers(saved: Callable, kind: str):
    own = saved(kind)
    weights = allocate(own.model)
    load_folder(weights, own.folder)
    network = Network(own.model, weights, 256)
    cache = Cache(own.model, num_slots=3, num_positions=256, prefix_bytes=0)
    generator = torch.Generator().manual_seed(3)
    token_ids = torch.randint(0, own.model.vocab_size, (NUM_TOKENS,), generator=generator)
    tokens_SP = token_ids.numpy()[None].repeat(3, axis=0)
    parts, start = [], 0
    with torch.inference_mode():
        expected = own.network(token_ids[None]).logits[0]
        for count in CHUNKS:
            chunks = Chunks(np.array([2]), np.array([start]), np.array([count]))
            hidden = network.forward(plan(tokens_SP, chunks), cache)
            parts.append(network.logits(hidden, torch.arange(count))[:count])
            start += count
    assert start == NUM_TOKENS
    torch.testing.assert_close(torch.cat(parts), expected, rtol=0, atol=1e-5)
    assert expected.abs().max() > 1  # the comparison means something


@pytest.mark.parametrize("kind", ["yarn", "qwen2", "llama"])
def test_every_parameter_has_its_hugging_face_name_and_value(saved: Callable, kind: str):
    own = saved(kind)
    weights = allocate(own.model)
    load_folder(weights, own.folder)
    stored = load_file(own.folder / "model.safetensors")
    assert set(stored) == set(weights.named)
    for name, tensor in stored.items():
        assert torch.equal(weights.named[name], tensor), name


def test_checksums_tell_one_changed_element(saved: Callable):
    own = saved("yarn")
    weights = allocate(own.model)
    load_folder(weights, own.folder)
    before = dict(checksums(weights))
    name = "model.layers.2.mlp.experts.5.up_proj.weight"
    changed = weights.named[name].clone()
    changed[3, 4] = torch.nextafter(changed[3, 4], torch.tensor(9.0))
    load(weights, [(name, changed)])
    after = dict(checksums(weights))
    assert [n for n in before if before[n] != after[n]] == [name]
    assert name not in dict(checksums(weights, skip=["experts.5"]))


def test_bf16_payloads_are_cast(saved: Callable):
    weights = allocate(saved("plain").model)
    value = torch.randn(weights.named["lm_head.weight"].shape).bfloat16()
    load(weights, [("lm_head.weight", value)])
    assert torch.equal(weights.named["lm_head.weight"], value.float())


def test_mtp_layers_on_disk_are_left_out_and_a_missing_tensor_is_named(
    saved: Callable, tmp_path: Path
):
    own = saved("plain")
    weights = allocate(own.model)
    stored = load_file(own.folder / "model.safetensors")
    extra = {"model.layers.4.eh_proj.weight": torch.zeros(2, 2)}
    save_file({**stored, **extra}, tmp_path / "model.safetensors")
    load_folder(weights, tmp_path)
    assert torch.equal(weights.named["model.norm.weight"], stored["model.norm.weight"])

    del stored["model.norm.weight"]
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks 1 parameters, the first is model\.norm\.weight"):
        load_folder(weights, tmp_path)


def test_a_tied_head_follows_the_embedding(saved: Callable):
    weights = allocate(replace(saved("plain").model, tie_word_embeddings=True))
    assert "lm_head.weight" not in weights.named
    assert weights.head is weights.embedding


def test_names_and_shapes_are_checked_in_one_sentence(saved: Callable):
    weights = allocate(saved("plain").model)
    with pytest.raises(ValueError, match=r"no parameter 'model\.bias' in this model"):
        check_names(weights, ["model.bias"], [[3]])
    with pytest.raises(ValueError, match=r"has shape \[64\] here, the update has \[3\]"):
        check_names(weights, ["model.norm.weight"], [[3]])


def test_widths_that_would_break_batch_invariance_are_refused(saved: Callable):
    model = replace(saved("plain").model, kv_lora_rank=10, v_head_dim=18)
    with pytest.raises(ValueError, match="kv_lora_rank=10, v_head_dim=18: not a multiple of 4"):
        Network(model, allocate(model), 64)


@pytest.mark.parametrize("num_rows", [16, 48, 112])
@pytest.mark.parametrize(("width", "num_out"), [(12, 8), (36, 12), (64, 64), (100, 4), (128, 1001)])
def test_rows_of_matrix_products_do_not_depend_on_count_and_place(
    num_rows: int, width: int, num_out: int
):
    """The property of the BLAS library on which batch invariance rests."""
    generator = torch.Generator().manual_seed(1)
    x, w = (torch.randn(n, width, generator=generator) for n in (160, num_out))
    expected = torch.nn.functional.linear(x, w)
    assert torch.equal(torch.nn.functional.linear(x[:num_rows].clone(), w), expected[:num_rows])
    order = torch.randperm(160, generator=generator)[:num_rows]
    assert torch.equal(torch.nn.functional.linear(x[order], w), expected[order])
