"""torch_dist folders hold the same weights, and no pickle in them is run."""

import os
import pickle
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import save
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from r1mega.config import schema
from r1mega.parallel.layout import Layout
from r1mega.weights.comparison import compare, names_of
from r1mega.weights.readers import open_reader
from r1mega.weights.regions import Region
from r1mega.weights.slices import SliceReader
from r1mega.weights.torch_dist.export import export
from r1mega.weights.torch_dist.files import TorchDistError, TorchDistFolder
from r1mega.weights.torch_dist.reader import TorchDistReader
from tests.unit.weights.weight_folders import (
    LLAMA,
    TIED,
    V3,
    quantized,
    random_weights,
    write_checkpoint,
    write_hf,
)

TP2_PP2_EP2 = Layout(world=4, tp=2, pp=2, ep=2)


def exported(source: Path, model: schema.Model, target: Path, *, fused: bool = True) -> Path:
    with open_reader(source, model) as reader:
        export(reader, model, target, fused_norms=fused)
    return target


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("model", "mtp"), [(V3, True), (V3, False), (TIED, False), (LLAMA, False)])
def test_comes_back_bit_equal(
    model: schema.Model, mtp: bool, fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tensors in several chunks, too.
    monkeypatch.setattr("r1mega.weights.torch_dist.export._CHUNK_BYTES", 3000)
    weights = random_weights(model, mtp=mtp)
    source = write_checkpoint(tmp_path / "ours", model, weights, TP2_PP2_EP2)
    target = exported(source, model, tmp_path / "theirs", fused=fused)
    with open_reader(source, model) as ours, open_reader(target, model) as theirs:
        names = names_of(ours, theirs, lambda name: True)
        assert set(names) == weights.keys()
        assert list(compare(ours, theirs, names)) == [None] * len(names)
        norms = [key for key in theirs._stored.tensors if "layer_norm_weight" in key]
    assert bool(norms) == (fused or model is not V3)


def test_fp8_becomes_bf16(tmp_path: Path) -> None:
    weights = quantized(random_weights(V3), V3)
    source = write_hf(tmp_path / "hf", V3, weights)
    target = exported(source, V3, tmp_path / "theirs")
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    shape = tuple(weights[name].shape)
    region = ((3, 20), (5, 9))
    with open_reader(source, V3) as reader, open_reader(target, V3) as theirs:
        assert theirs.tensors[name].dtype == "BF16"
        expected = reader.read(name, shape, region).bfloat16()
        assert torch.equal(theirs.read(name, shape, region), expected)


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    weights = random_weights(V3)
    source = write_hf(tmp_path / "hf", V3, weights)
    target = exported(source, V3, tmp_path / "there")
    with pytest.raises(ValueError, match="there is there already: name a new folder"):
        exported(source, V3, target)
    with pytest.raises(ValueError, match=r"inner is inside .*hf, which is only read"):
        exported(source, V3, source / "inner")
    del weights["model.norm.weight"]
    lacking = write_hf(tmp_path / "lacking", V3, weights)
    with pytest.raises(ValueError, match=r"model\.norm\.weight is missing, but the network has"):
        exported(lacking, V3, tmp_path / "new")
    shard = source / "model-1.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(ValueError, match="is damaged"):
        exported(source, V3, tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "lacking", "there"]


def test_what_one_thread_cannot_read_ends_an_export(tmp_path: Path) -> None:
    """Whichever of the writer's threads it is: torch itself would go on without its tensors."""
    weights = random_weights(LLAMA)
    source = write_hf(tmp_path / "hf", LLAMA, weights)
    for unreadable in list(weights)[:8]:

        class Failing(SliceReader):
            def read_stored(self, name: str, region: Region, bad: str = unreadable) -> Tensor:
                if name == bad:
                    raise ValueError(f"{name} is gone")
                return super().read_stored(name, region)

        with Failing(source) as reader, pytest.raises(ValueError, match=f"{unreadable} is gone"):
            export(reader, LLAMA, tmp_path / "theirs", fused_norms=True)
        assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_another_network_is_refused(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", TIED, random_weights(TIED))
    target = exported(source, TIED, tmp_path / "theirs")
    with pytest.raises(TorchDistError, match=r"has no output_layer\.weight, which lm_head\.weight"):
        TorchDistReader(target, replace(TIED, tie_word_embeddings=False))
    with pytest.raises(TorchDistError, match=r"has shape \[2, 160, 64\], but the network has"):
        TorchDistReader(target, replace(TIED, intermediate_size=88))
    with pytest.raises(TorchDistError, match=r"holds \S+bias, which the network does not have"):
        TorchDistReader(target, replace(TIED, architecture="llama"))


def test_padded_vocabularies_and_prefixes_of_other_trainers(tmp_path: Path) -> None:
    weights = random_weights(LLAMA)
    source = write_hf(tmp_path / "hf", LLAMA, weights)
    plain = TorchDistFolder(exported(source, LLAMA, tmp_path / "plain"))
    tensors = {}
    for key, stored in plain.tensors.items():
        values = plain.read(key, tuple((0, size) for size in stored.shape))
        if key in ("embedding.word_embeddings.weight", "output_layer.weight"):
            values = torch.cat([values, torch.zeros(32, values.shape[1], dtype=values.dtype)])
        tensors[f"module.{key}"] = values
        tensors[f"optimizer.state.exp_avg.module.{key}"] = values
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        save(tensors, checkpoint_id=tmp_path / "padded", no_dist=True)
    with open_reader(source, LLAMA) as ours, open_reader(tmp_path / "padded", LLAMA) as theirs:
        names = names_of(ours, theirs, lambda name: True)
        assert list(compare(ours, theirs, names)) == [None] * len(weights)


class _Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_hostile_metadata_is_not_run(tmp_path: Path) -> None:
    folder, trap = tmp_path / "folder", tmp_path / "trap"
    folder.mkdir()
    metadata = Metadata({}, planner_data=_Hostile(trap))
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(TorchDistError, match=r"asks for posix\.mkdir, which no checkpoint"):
        TorchDistFolder(folder)
    assert not trap.exists()
    pickle.loads((folder / ".metadata").read_bytes())
    assert trap.exists()  # it would have


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("torch", "load"),
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch.distributed.checkpoint.filesystem", "FileSystem"),
        ("collections", "OrderedDict"),
    ],
)
def test_only_records_are_made(module: str, name: str, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(f"c{module}\n{name}\n.".encode())
    with pytest.raises(TorchDistError, match=rf"asks for {module}\.{name}"):
        TorchDistFolder(tmp_path)


def test_a_hostile_tensor_is_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    torch.save(_Hostile(trap), tmp_path / "x.distcp")
    _describe(tmp_path, length=(tmp_path / "x.distcp").stat().st_size)
    with pytest.raises(TorchDistError, match=r"t at byte 0 cannot be read \(UnpicklingError"):
        TorchDistFolder(tmp_path).read("t", ((0, 4),))
    assert not trap.exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"file": "../x.distcp"}, "is not inside the folder"),
        ({"file": "/etc/passwd"}, "is not inside the folder"),
        ({"chunks": [(0, 3)]}, "t is not whole: its pieces hold 3 of its 4 elements"),
        ({"chunks": [(0, 3), (2, 2)]}, r"t is not whole: its pieces \[0:3\] and \[2:4\] overlap"),
        ({"chunks": [(0, 5)]}, "lies outside its shape"),
    ],
)
def test_metadata_that_makes_no_sense(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    torch.save(torch.arange(4.0), tmp_path / "x.distcp")
    _describe(tmp_path, **changes)
    with pytest.raises(TorchDistError, match=words):
        TorchDistFolder(tmp_path)


@pytest.mark.parametrize(
    ("stored", "length", "words"),
    [
        (torch.arange(4.0), 1 << 20, r"x\.distcp ends early: copy it anew"),
        (torch.arange(3.0), 0, r"\[3\], but \.metadata says torch\.float32 \[4\]"),
        (torch.arange(4), 0, r"is torch\.int64 \[4\]"),
        ([1.0], 0, "is a list"),
    ],
)
def test_a_file_that_holds_something_else(
    stored: Any, length: int, words: str, tmp_path: Path
) -> None:
    torch.save(stored, tmp_path / "x.distcp")
    _describe(tmp_path, length=length or (tmp_path / "x.distcp").stat().st_size)
    with pytest.raises(TorchDistError, match=words):
        TorchDistFolder(tmp_path).read("t", ((0, 4),))


def test_damaged_bytes_are_an_error_or_change_values_only(tmp_path: Path) -> None:
    """There are no digests in this format, so some damage cannot be seen; none may crash."""
    source = write_hf(tmp_path / "hf", TIED, random_weights(TIED))
    folder = exported(source, TIED, tmp_path / "theirs")
    draw = random.Random(0)
    for path in [folder / ".metadata"] * 100 + [*folder.glob("*.distcp")] * 10:
        content = path.read_bytes()
        position = draw.randrange(len(content))
        damaged = bytearray(content)
        damaged[position] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            reader = TorchDistReader(folder, TIED)
            for name, stored in reader.tensors.items():
                reader.read(name, stored.shape, tuple((0, size) for size in stored.shape))
        except TorchDistError:
            pass
        path.write_bytes(content)


def test_not_a_torch_dist_folder(tmp_path: Path) -> None:
    with pytest.raises(TorchDistError, match=r"has no \.metadata: it is no torch_dist folder"):
        TorchDistFolder(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("12")
    with pytest.raises(TorchDistError, match="the folder that latest_checkpointed_iteration"):
        TorchDistFolder(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(TorchDistError, match="it holds a dict"):
        TorchDistFolder(tmp_path)


def _describe(
    folder: Path,
    *,
    file: str = "x.distcp",
    chunks: list[tuple[int, int]] | None = None,
    length: int = 1,
) -> None:
    """Metadata of one tensor "t" of four float32, in (offset, size) ``chunks``."""
    places = chunks or [(0, 4)]
    tensor = TensorStorageMetadata(
        TensorProperties(torch.float32),
        torch.Size([4]),
        [ChunkStorageMetadata(torch.Size([a]), torch.Size([n])) for a, n in places],
    )
    storage = {MetadataIndex("t", [a]): _StorageInfo(file, 0, length) for a, _ in places}
    metadata = Metadata({"t": tensor}, storage_data=storage)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
