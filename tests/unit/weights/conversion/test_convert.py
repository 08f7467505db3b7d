"""Hugging Face -> ours -> Hugging Face: bit-equal through any layouts, in bf16 and in FP8."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from r1mega.config.schema import Model
from r1mega.model.hf_config import FP8_QUANTIZATION, hf_config
from r1mega.weights import fp8
from r1mega.weights.blocks import scale_name, scale_shape
from r1mega.weights.checkpoints.checkpoint import read_state
from r1mega.weights.checkpoints.manifest import read_manifest, verify
from r1mega.weights.conversion.convert import hf_to_megatron, megatron_to_hf, smallest_layout
from r1mega.weights.names import Spec, fp8_weights, hf_shapes, parameter_slices
from r1mega.weights.slices import SliceReader
from r1mega.weights.streams import Precision
from r1mega.weights.tensor_file import TensorFile, read_header
from tests.unit.weights.weight_folders import LLAMA, TIED, V3, quantized, random_weights, write_hf

# Cuts fall inside blocks of 128, and blocks are cut off by edges.
WIDE = Model(
    vocab_size=96,
    hidden_size=192,
    intermediate_size=320,
    moe_intermediate_size=160,
    num_hidden_layers=3,
    q_lora_rank=130,
    v_head_dim=80,
    n_routed_experts=4,
    n_group=2,
    topk_group=1,
    num_experts_per_tok=2,
    num_nextn_predict_layers=1,
)
Tensors = dict[str, Tensor]


class Listening:
    """Keeps what it was told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.last: dict[str, tuple[int, int]] = {}

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)

    def progress(self, what: str, done: int, total: int) -> None:
        self.last[what] = done, total


def convert(folder: Path, out: Path, **axes: int) -> Path:
    hf_to_megatron(folder, out, Listening(), **axes)
    return out


def export(folder: Path, out: Path, dtype: Precision = "keep", shard_bytes: int = 10**9) -> Path:
    megatron_to_hf(folder, out, Listening(), dtype=dtype, shard_bytes=shard_bytes)
    return out


def read_all(folder: Path) -> Tensors:
    with SliceReader(folder) as reader:
        return {
            name: reader.read_stored(name, tuple((0, size) for size in stored.shape))
            for name, stored in reader.tensors.items()
        }


def bits(values: Tensor) -> Tensor:
    return values.contiguous().flatten().view(torch.uint8)


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == values.dtype, name
        assert found[name].shape == values.shape, name
        assert torch.equal(bits(found[name]), bits(values)), name


def with_mtp(model: Model) -> Tensors:
    """With MTP layers and their copies of embedding and head, each of its own values."""
    weights = random_weights(model, mtp=True)
    for name, shape in hf_shapes(model, Spec(mtp=True, mtp_copies=True)).items():
        weights.setdefault(name, torch.randn(shape).bfloat16())
    return weights


@st.composite
def axes_of(draw: st.DrawFn, model: Model) -> dict[str, int]:
    dense = model.architecture != "deepseek_v3"
    return {
        "tp": draw(st.sampled_from([1, 2, 4])),
        "pp": draw(st.integers(1, model.num_hidden_layers)),
        "ep": 1 if dense else draw(st.sampled_from([1, 2, 4])),
        "etp": 1 if dense else draw(st.sampled_from([1, 2, 4])),
    }


@pytest.mark.parametrize("model", [V3, WIDE, LLAMA, TIED], ids=["v3", "wide", "llama", "tied"])
def test_any_two_layouts_between_change_no_bit(model: Model, tmp_path: Path) -> None:
    weights = with_mtp(model) if model.num_nextn_predict_layers else random_weights(model)
    write_hf(tmp_path / "hf", model, weights)
    places = iter(range(10**6))

    @settings(max_examples=12, deadline=None)
    @given(axes_of(model), axes_of(model), st.integers(2_000, 10**6))
    def check(first: dict[str, int], second: dict[str, int], shard_bytes: int) -> None:
        place = tmp_path / str(next(places))
        convert(tmp_path / "hf", place / "a", **first)
        convert(place / "a", place / "b", **second)
        verify(place / "b")
        export(place / "b", place / "back", shard_bytes=shard_bytes)
        assert_same(read_all(place / "back"), weights)

    check()


def test_a_checkpoint_holds_what_each_rank_of_its_layout_needs(tmp_path: Path) -> None:
    weights = with_mtp(V3)
    write_hf(tmp_path / "hf", V3, weights)
    (tmp_path / "hf/tokenizer.json").write_text("{}")
    folder = convert(tmp_path / "hf", tmp_path / "out", tp=2, pp=3, ep=4)
    layout = read_state(folder).layout
    assert (layout.world, layout.layers_in_first_stage, layout.layers_in_last_stage) == (12, 1, 1)
    sizes = [path.stat().st_size for path in sorted(folder.glob("weights-*.safetensors"))]
    assert len(sizes) == 12
    stages = [sum(sizes[stage * 4 : stage * 4 + 4]) for stage in range(3)]
    for stage, total in enumerate(stages):  # replicas share what they all hold
        assert max(sizes[stage * 4 : stage * 4 + 4]) <= 1.15 * total / 4
    with SliceReader(folder) as reader:
        for rank in range(layout.world):
            mine = set(read_header(folder / f"weights-{rank:05d}.safetensors"))
            spec = Spec(mtp=True, mtp_copies=True)
            assert mine <= {s.hf_name for s in parameter_slices(V3, layout, rank, spec)}
            for piece in parameter_slices(V3, layout, rank):
                cut = weights[piece.hf_name][tuple(slice(*span) for span in piece.region)]
                assert torch.equal(reader.read(piece.hf_name, piece.hf_shape, piece.region), cut)
    assert (folder / "hf/tokenizer.json").read_text() == "{}"
    assert "hf/config.json" in read_manifest(folder)


def test_what_no_rank_needs_is_carried_too(tmp_path: Path) -> None:
    weights = random_weights(TIED)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.randn(8)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    write_hf(tmp_path / "hf", TIED, weights)
    back = export(convert(tmp_path / "hf", tmp_path / "a", tp=2), tmp_path / "b", "bf16")
    assert_same(read_all(back), weights)


def test_fp8_is_kept_cut_and_read_in_any_layout(tmp_path: Path) -> None:
    weights = quantized(with_mtp(WIDE), WIDE)
    write_hf(tmp_path / "hf", WIDE, weights)
    first = convert(tmp_path / "hf", tmp_path / "a", tp=2, pp=3, ep=2, etp=2)
    second = convert(first, tmp_path / "b", tp=4)
    assert_same(read_all(export(second, tmp_path / "back")), weights)
    layout = read_state(first).layout
    with SliceReader(tmp_path / "hf") as direct, SliceReader(second) as cut:
        for rank in range(layout.world):
            for piece in parameter_slices(WIDE, layout, rank):
                asked = piece.hf_name, piece.hf_shape, piece.region
                whole = weights[piece.hf_name]
                if whole.dtype == torch.float8_e4m3fn:
                    whole = fp8.dequantize(whole, weights[scale_name(piece.hf_name)])
                wanted = whole[tuple(slice(*span) for span in piece.region)]
                assert torch.equal(direct.read(*asked), wanted)
                assert torch.equal(cut.read(*asked), wanted)


def test_fp8_through_bf16_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("r1mega.weights.streams.BAND_BYTES", 30_000)  # several bands each
    source = with_mtp(WIDE)
    weights = quantized(source, WIDE)
    write_hf(tmp_path / "hf", WIDE, weights)
    plain = export(convert(tmp_path / "hf", tmp_path / "a", tp=2), tmp_path / "b", "bf16")
    again = export(convert(plain, tmp_path / "c", ep=2), tmp_path / "d", "fp8")
    config = json.loads((plain / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["torch_dtype"] == "bfloat16"
    for name, values in read_all(plain).items():
        bias = name.endswith("e_score_correction_bias")
        assert values.dtype == (torch.float32 if bias else torch.bfloat16)
        if name in fp8_weights(WIDE, Spec(mtp=True)):
            exact = fp8.dequantize(weights[name], weights[scale_name(name)])
            assert torch.equal(values, exact.bfloat16())
        else:
            assert torch.equal(values, source[name])
    found = read_all(again)
    for name, scales in [(n, v) for n, v in weights.items() if n.endswith("_scale_inv")]:
        assert ((found[name] - scales).abs() <= scales * 2**-8).all()
        found[name] = scales
    assert_same(found, weights)
    quantization = json.loads((again / "config.json").read_text())["quantization_config"]
    assert (quantization["quant_method"], quantization["weight_block_size"]) == ("fp8", [128, 128])


def test_fp8_is_described_as_it_is_made(tmp_path: Path) -> None:
    """Whatever the weights were before."""
    folder = write_hf(tmp_path / "hf", V3, with_mtp(V3))
    other = {"quantization_config": {"quant_method": "awq", "weight_block_size": [64, 64]}}
    (folder / "config.json").write_text(json.dumps(hf_config(V3) | other))
    made = json.loads((export(folder, tmp_path / "a", "fp8") / "config.json").read_text())
    assert made["quantization_config"] == FP8_QUANTIZATION


def test_hidden_files_stay_behind(tmp_path: Path) -> None:
    """.metadata would make a folder torch_dist's."""
    folder = write_hf(tmp_path / "hf", LLAMA, random_weights(LLAMA))
    (folder / ".metadata").write_text("")
    assert list((convert(folder, tmp_path / "a") / "hf").iterdir()) == [
        tmp_path / "a/hf/config.json"
    ]


def test_exactly_what_published_checkpoints_quantize(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", WIDE, with_mtp(WIDE))
    made = read_all(export(convert(tmp_path / "hf", tmp_path / "a"), tmp_path / "b", "fp8"))
    codes = {name for name, values in made.items() if values.dtype == torch.float8_e4m3fn}
    assert codes == fp8_weights(WIDE, Spec(mtp=True))
    for plain in ("embed_tokens", "lm_head", "norm", "mlp.gate.", "eh_proj", "shared_head"):
        assert not any(plain in name for name in codes)
    for name in codes:
        assert made[scale_name(name)].shape == scale_shape(tuple(made[name].shape))


def test_an_fp32_checkpoint_is_kept_and_cast(tmp_path: Path) -> None:
    weights = {name: values.float() for name, values in random_weights(LLAMA).items()}
    write_hf(tmp_path / "hf", LLAMA, weights)
    kept = export(convert(tmp_path / "hf", tmp_path / "a"), tmp_path / "b")
    assert_same(read_all(kept), weights)
    assert json.loads((kept / "config.json").read_text())["torch_dtype"] == "float32"
    cast = export(tmp_path / "a", tmp_path / "c", "bf16")
    assert_same(read_all(cast), {name: values.bfloat16() for name, values in weights.items()})
    assert json.loads((cast / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("model", [V3, LLAMA, TIED], ids=["deepseek_v3", "llama", "qwen2"])
def test_transformers_computes_the_same_logits(model: Model, tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", model, random_weights(model))
    convert(tmp_path / "hf", tmp_path / "a", tp=2, pp=2)
    export(tmp_path / "a", tmp_path / "back", shard_bytes=50_000)
    tokens = torch.arange(24).view(2, 12)
    logits = []
    for folder in (tmp_path / "hf", tmp_path / "back"):
        network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        with torch.no_grad():
            logits.append(network(tokens).logits)
    assert torch.equal(*logits)
    assert logits[0].std() > 0


def test_shards_are_of_the_size_asked_for(tmp_path: Path) -> None:
    weights = random_weights(LLAMA)
    write_hf(tmp_path / "hf", LLAMA, weights)
    back = export(convert(tmp_path / "hf", tmp_path / "a"), tmp_path / "b", shard_bytes=40_000)
    files = sorted(path.name for path in back.glob("*.safetensors"))
    assert files == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in weights.values())
    assert set(index["weight_map"].values()) == set(files)
    for file in files:
        with TensorFile.open(back / file) as tensors:
            assert all(entry.start % entry.itemsize == 0 for entry in tensors.entries.values())
            assert sum(entry.nbytes for entry in tensors.entries.values()) <= 40_000


def test_an_untouched_description_stays_byte_for_byte(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", LLAMA, random_weights(LLAMA))
    text = json.dumps(hf_config(LLAMA, dtype="bfloat16") | {"mine": [1]}, indent=7)
    (tmp_path / "hf/config.json").write_text(text)
    (tmp_path / "hf/pytorch_model.bin").write_text("weights of another format")
    back = export(convert(tmp_path / "hf", tmp_path / "a"), tmp_path / "b")
    assert (back / "config.json").read_text() == text
    assert not (back / "pytorch_model.bin").exists()


def test_progress_ends_at_the_whole(tmp_path: Path) -> None:
    weights = random_weights(LLAMA)
    write_hf(tmp_path / "hf", LLAMA, weights)
    listening = Listening()
    hf_to_megatron(tmp_path / "hf", tmp_path / "a", listening, tp=2)
    total = sum(values.nbytes for values in weights.values())
    assert listening.last == {"copied": (total, total), "verified": (total, total)}
    assert listening.notes == []


def test_the_layout_is_the_smallest_one() -> None:
    assert smallest_layout(V3, tp=4, pp=1, ep=2, etp=1).world == 4
    assert smallest_layout(V3, tp=1, pp=4, ep=4, etp=2).world == 32
    with pytest.raises(ValueError, match=r"tp=3 must divide model.num_attention_heads=4"):
        smallest_layout(V3, tp=3, pp=1, ep=1, etp=1)
    with pytest.raises(ValueError, match="pp=5 must be at most num_hidden_layers=4"):
        smallest_layout(V3, tp=1, pp=5, ep=1, etp=1)
    with pytest.raises(ValueError, match=r"ep=2 has no meaning for llama"):
        smallest_layout(LLAMA, tp=1, pp=1, ep=2, etp=1)
