"""Whether a folder is whole, what is in it and how two differ; no damage goes unseen."""

import json
import math
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from r1mega.cluster.initial_weights import check_weights
from r1mega.config import schema
from r1mega.parallel.layout import Layout
from r1mega.weights.checkpoints.manifest import commit, record_bytes
from r1mega.weights.comparison import Difference, compare, names_of
from r1mega.weights.inspection import Summary, TensorFacts, check_whole, describe, summarize
from r1mega.weights.names import Spec
from r1mega.weights.readers import open_reader, read_network
from r1mega.weights.tensor_file import read_header
from tests.unit.weights.weight_folders import (
    TIED,
    V3,
    quantized,
    random_weights,
    write_checkpoint,
    write_hf,
)

ONE = Layout(world=1)
TP2_PP2_EP2 = Layout(world=4, tp=2, pp=2, ep=2)
BIAS = "model.layers.2.mlp.gate.e_score_correction_bias"
DOWN = "model.layers.1.mlp.experts.3.down_proj.weight"


def inspect(folder: Path) -> None:
    """As the tool does."""
    network = read_network(folder)
    with open_reader(folder, network) as reader:
        check_whole(reader, network)
        list(describe(reader, reader.tensors))


def differences(first: Path, second: Path) -> list[Difference]:
    with (
        open_reader(first, read_network(first)) as a,
        open_reader(second, read_network(second)) as b,
    ):
        found = compare(a, b, names_of(a, b, lambda name: True))
        return [difference for difference in found if difference is not None]


def test_says_what_is_there(tmp_path: Path) -> None:
    weights = random_weights(V3, mtp=True)
    weights[DOWN][5, 7] = math.nan
    weights[DOWN][6, :2] = -math.inf
    folder = write_checkpoint(tmp_path / "c", V3, weights, TP2_PP2_EP2)
    with open_reader(folder, V3) as reader:
        facts = {f.name: f for f in describe(reader, reader.tensors)}
        summary = summarize(reader, V3)
    for name, values in weights.items():
        norm = float(values.double().nan_to_num(0.0, 0.0, 0.0).norm())
        assert math.isclose(facts[name].norm, norm, rel_tol=1e-12)
    assert (facts[DOWN].num_nan, facts[DOWN].num_infinite) == (1, 2)
    assert str(facts[DOWN]).endswith(f"{DOWN}  1 NaN, 2 infinite")
    assert facts[BIAS] == TensorFacts(BIAS, (8,), "F32", facts[BIAS].norm, 0, 0)
    count = sum(values.numel() for values in weights.values())
    assert summary.num_parameters == count
    assert summary.tensor_bytes == sum(values.nbytes for values in weights.values())
    assert summary.file_bytes == sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    assert (summary.format, summary.step, summary.has_mtp) == ("checkpoint", 7, True)
    assert "layout world=4 tp=2 pp=2 ep=2, written by" in str(summary)


def test_fp8_counts_as_what_it_stands_for(tmp_path: Path) -> None:
    weights = random_weights(V3)
    codes = quantized(weights, V3)
    folder = write_hf(tmp_path / "fp8", V3, codes)
    with open_reader(folder, V3) as reader:
        (facts,) = describe(reader, [DOWN])
        values = reader.read(DOWN, facts.shape, tuple((0, n) for n in facts.shape))
        summary: Summary = summarize(reader, V3)
    assert math.isclose(facts.norm, float(values.double().norm()), rel_tol=1e-12)
    assert summary.num_parameters == sum(values.numel() for values in weights.values())
    assert summary.dtypes == ("BF16", "F32", "F8_E4M3")


def test_layouts_and_formats_are_equal_bit_for_bit(tmp_path: Path) -> None:
    weights = random_weights(TIED)
    first = write_hf(tmp_path / "hf", TIED, weights, files=3)
    for name, layout in {"one": ONE, "cut": Layout(world=4, tp=2, pp=2)}.items():
        assert differences(first, write_checkpoint(tmp_path / name, TIED, weights, layout)) == []


def test_one_entry_is_found_and_named(tmp_path: Path) -> None:
    weights = random_weights(V3)
    first = write_checkpoint(tmp_path / "a", V3, weights, TP2_PP2_EP2)
    changed = {name: values.clone() for name, values in weights.items()}
    changed[DOWN][40, 3] += 2.0
    changed[DOWN][41, 3] += 0.5
    weights[BIAS][0], changed[BIAS][0] = 0.0, -0.0  # the same number in other bits
    second = write_hf(tmp_path / "b", V3, changed)
    found = {d.name: d for d in differences(write_hf(tmp_path / "a2", V3, weights), second)}
    assert found.keys() == {BIAS, DOWN}
    bias, down = found[BIAS], found[DOWN]
    assert down.where == (40, 3)
    assert down.largest == pytest.approx(2.0, abs=0.02)
    assert bias.largest == 0.0
    assert "the same numbers" in str(bias)
    assert [d.where for d in differences(first, second) if d.name == DOWN] == [(40, 3)]


def test_other_tensors_shapes_and_dtypes(tmp_path: Path) -> None:
    weights = random_weights(TIED)
    first = write_hf(tmp_path / "a", TIED, weights)
    norm, embedding = "model.norm.weight", "model.embed_tokens.weight"
    others: dict[str, Tensor] = dict(weights)
    others["lm_head.weight"] = others[embedding]
    others[norm] = others[norm].float()
    second = write_hf(tmp_path / "b", TIED, others)
    found = {d.name: d for d in differences(first, second)}
    assert found.keys() == {"lm_head.weight", norm}
    assert found["lm_head.weight"].what == f"is only in {second}"
    assert str(found[norm]) == f"{norm} is BF16 against F32, the same numbers"


def test_fp8_is_compared_as_numbers(tmp_path: Path) -> None:
    weights = random_weights(V3)
    codes = quantized(weights, V3)
    first, second = write_hf(tmp_path / "a", V3, weights), write_hf(tmp_path / "b", V3, codes)
    found = differences(first, second)
    codes_of = {n for n, v in codes.items() if v.dtype == torch.float8_e4m3fn}
    assert {d.name for d in found} == codes_of
    # Three bits of mantissa: at most a sixteenth of the largest entry of a block.
    assert all(0 < (d.largest or 0) <= (d.reach or 0) / 16 for d in found)
    assert differences(second, write_hf(tmp_path / "c", V3, codes)) == []


def test_a_name_that_nothing_has(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "a", TIED, random_weights(TIED))
    with open_reader(folder, TIED) as reader, pytest.raises(ValueError, match="nothing was comp"):
        names_of(reader, reader, lambda name: False)


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """100 of 100, and in weights the tensor that was hit."""
    weights = random_weights(V3)
    folder = write_checkpoint(tmp_path / "c", V3, weights, TP2_PP2_EP2)
    draw = random.Random(1)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert len(files) == 8
    found = named = hits = 0
    for i in range(100):
        path = files[i % len(files)]
        content = path.read_bytes()
        position = draw.randrange(len(content))
        path.write_bytes(_flipped(content, position, draw.randrange(8)))
        hit = _tensor_at(folder / path.name, content, position, tmp_path)
        with pytest.raises(ValueError, match=r"\S") as caught:
            inspect(folder)
        assert "\n" not in str(caught.value)
        found += 1
        hits += hit is not None
        named += hit is not None and hit in str(caught.value)
        path.write_bytes(content)
    assert found == 100
    assert hits == named > 30
    inspect(folder)


def _flipped(content: bytes, position: int, bit: int) -> bytes:
    damaged = bytearray(content)
    damaged[position] ^= 1 << bit
    return bytes(damaged)


def _tensor_at(path: Path, content: bytes, position: int, scratch: Path) -> str | None:
    if path.suffix != ".safetensors":
        return None
    whole = scratch / "whole.safetensors"
    whole.write_bytes(content)
    for name, entry in read_header(whole).items():
        if entry.start <= position < entry.start + entry.nbytes:
            return name
    return None


def test_every_cut_is_found(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", TIED, random_weights(TIED), Layout(world=2, tp=2))
    draw = random.Random(2)
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        content = path.read_bytes()
        for length in (0, draw.randrange(len(content)), len(content) - 1):
            path.write_bytes(content[:length])
            with pytest.raises(ValueError, match=r"damaged|cannot be read|describe"):
                inspect(folder)
        path.unlink()
        with pytest.raises(ValueError, match=path.name):
            inspect(folder)
        path.write_bytes(content)
    inspect(folder)


def _without_hole(entry: dict[str, Any]) -> None:
    entry["pieces"].pop()


def _twice(entry: dict[str, Any]) -> None:
    entry["pieces"].append(entry["pieces"][0])


def _outside(entry: dict[str, Any]) -> None:
    entry["pieces"][0]["region"][0][0] -= 4


def _elsewhere(entry: dict[str, Any]) -> None:
    entry["pieces"][0]["file"] = "../c/weights-00000.safetensors"


def _of_another(entry: dict[str, Any]) -> None:
    entry["pieces"][0]["key"] = "model.norm.weight"


def _unread(entry: dict[str, Any]) -> None:
    del entry["pieces"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_without_hole, r"its pieces hold \d+ of its \d+ elements"),
        (_twice, "overlap"),
        (_outside, "lies outside its shape"),
        (_elsewhere, r"'\.\./c/weights-00000\.safetensors', which is not inside it"),
        (_of_another, "but the index says"),
        (_unread, r"index\.json cannot be read"),
    ],
)
def test_an_index_that_is_wrong_though_its_digest_is_right(
    change: Callable[[dict[str, Any]], None], words: str, tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path / "c", TIED, random_weights(TIED), Layout(world=2, tp=2))
    index = json.loads((folder / "index.json").read_text())
    change(index["tensors"]["model.embed_tokens.weight"])
    (folder / "index.json").write_text(json.dumps(index))
    (folder / "manifest.json").unlink()
    files = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file()]
    records = {str(name): record_bytes((folder / name).read_bytes()) for name in files}
    renamed = folder.rename(tmp_path / "partial")
    commit(renamed, folder, records)
    with pytest.raises(ValueError, match=words):
        inspect(folder)
    if change is not _of_another:  # files are not opened before a run, but refused by its ranks
        with pytest.raises(ValueError, match=words):
            _before_a_run(folder)


def _index_names_a_file_outside(folder: Path) -> None:
    _change_map(folder, "model.norm.weight", "../a/model-0.safetensors")


def _index_names_no_file(folder: Path) -> None:
    _change_map(folder, "model.norm.weight", "model-9.safetensors")


def _index_leaves_a_tensor_out(folder: Path) -> None:
    _change_map(folder, "model.norm.weight", None)


def _change_map(folder: Path, name: str, file: str | None) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][name] = file
    if file is None:
        del index["weight_map"][name]
    path.write_text(json.dumps(index))


def _no_map(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')


def _deep(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("[" * 100_000)


def _absurd_header(folder: Path) -> None:
    _header(folder, struct.pack("<Q", 1 << 62))


def _deep_header(folder: Path) -> None:
    _header(folder, struct.pack("<Q", 90_000) + b"[" * 90_000)


def _fractional_header(folder: Path) -> None:
    text = b'{"t":{"dtype":"F32","shape":[1],"data_offsets":[0.0,4.0]}}'
    _header(folder, struct.pack("<Q", len(text)) + text + b"\0" * 4, whole=True)


def _header(folder: Path, start: bytes, *, whole: bool = False) -> None:
    path = folder / "model-0.safetensors"
    path.write_bytes(start if whole else start + path.read_bytes()[len(start) :])


def _truncated(folder: Path) -> None:
    path = folder / "model-1.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _another_config(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"intermediate_size": 88}))


def _another_kind(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "bert", "eos_token_id": 1}')


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[1, 2]")


def _shard_loops(folder: Path) -> None:
    (folder / "model-0.safetensors").unlink()
    (folder / "model-0.safetensors").symlink_to("model-0.safetensors")


def _shard_is_a_folder(folder: Path) -> None:
    (folder / "model-0.safetensors").unlink()
    (folder / "model-0.safetensors").mkdir()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_index_names_a_file_outside, "which is not inside it"),
        (_index_names_no_file, r"model-9\.safetensors cannot be read: No such file"),
        (_index_leaves_a_tensor_out, r"holds model\.norm\.weight, which|no tensor 'model\.norm"),
        (_no_map, "has no map of names to files"),
        (_deep, r"index\.json cannot be read"),
        (_absurd_header, "a header of 4611686018427387904 bytes in a file of"),
        (_deep_header, "its header cannot be read"),
        (_fractional_header, "its header cannot be read"),
        (_truncated, r"model-1\.safetensors is damaged"),
        (_another_config, r"intermediate_size|has shape \[80, 64\] but the model wants \[88, 64\]"),
        (_another_kind, "model_type"),
        (_no_config, r"has no config\.json to say what network it holds"),
        (_a_list, r"config\.json"),
        (_shard_loops, "Too many levels of symbolic links"),
        (_shard_is_a_folder, "Is a directory"),
    ],
)
def test_a_damaged_hugging_face_folder(
    damage: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    """By the tool, and before any process of a run starts."""
    folder = write_hf(tmp_path / "a", TIED, random_weights(TIED))
    damage(folder)
    for check in (inspect, _before_a_run):
        with pytest.raises(ValueError, match=words) as caught:
            check(folder)
        assert "\n" not in str(caught.value)


def _before_a_run(folder: Path) -> None:
    check_weights(folder, TIED, Spec())


def _missing(path: Path) -> None:
    pass


def _a_file(path: Path) -> None:
    path.write_text("x")


def _empty(path: Path) -> None:
    path.mkdir()


def _a_loop(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize("make", [_missing, _a_file, _empty, _a_loop])
def test_no_folder_of_weights(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "x")
    for check in (inspect, _before_a_run):
        with pytest.raises(ValueError, match=r"/x\b.* is not there|/x(:| is empty|: no model)"):
            check(tmp_path / "x")


def test_a_network_that_is_not_the_one(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "a", TIED, random_weights(TIED))
    other = schema.Model(architecture="qwen2", vocab_size=96, num_hidden_layers=2)
    with open_reader(folder, TIED) as reader, pytest.raises(ValueError, match="another model"):
        check_whole(reader, other)
