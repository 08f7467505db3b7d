"""The slice reader returns exactly the rectangle asked for, from either kind of folder."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from r1mega.weights.slices import SliceReader, intersect

TABLE = torch.arange(48, dtype=torch.float32).reshape(6, 8)
PARTS = {"a.safetensors": ((0, 6), (0, 3)), "b.safetensors": ((0, 6), (3, 8))}


@pytest.fixture(params=["single", "sharded", "checkpoint"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "single":
        save_file({"t": TABLE}, tmp_path / "model.safetensors")
    elif request.param == "sharded":
        save_file({"t": TABLE}, tmp_path / "x.safetensors")
        index = {"weight_map": {"t": "x.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        for file, (rows, columns) in PARTS.items():
            save_file({"t": TABLE[slice(*rows), slice(*columns)].contiguous()}, tmp_path / file)
        write_index(tmp_path, list(PARTS))
    return tmp_path


def write_index(folder: Path, files: list[str]) -> None:
    pieces = [{"file": file, "key": "t", "region": PARTS[file]} for file in files]
    index = {"tensors": {"t": {"shape": [6, 8], "pieces": pieces}}}
    (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("region", [((0, 6), (0, 8)), ((2, 5), (1, 7)), ((5, 6), (4, 5))])
def test_reads_a_rectangle(folder: Path, region: tuple[tuple[int, int], ...]) -> None:
    with SliceReader(folder) as reader:
        rows, columns = region
        assert torch.equal(reader.read("t", (6, 8), region), TABLE[slice(*rows), slice(*columns)])


def test_says_what_is_wrong(folder: Path) -> None:
    whole = ((0, 6), (0, 8))
    with SliceReader(folder) as reader:
        with pytest.raises(
            ValueError, match="no tensor 'u'; is this a checkpoint of another model"
        ):
            reader.read("u", (6, 8), whole)
        with pytest.raises(ValueError, match=r"t has shape \[6, 8\] but the model wants \[8, 6\]"):
            reader.read("t", (8, 6), whole)


def test_a_tensor_stored_in_part_is_refused(tmp_path: Path) -> None:
    save_file({"t": TABLE[:, :3].contiguous()}, tmp_path / "a.safetensors")
    write_index(tmp_path, ["a.safetensors"])
    with SliceReader(tmp_path) as reader, pytest.raises(ValueError, match="stored only in part"):
        reader.read("t", (6, 8), ((0, 6), (2, 5)))


def test_an_empty_folder_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name a Hugging Face folder"):
        SliceReader(tmp_path)


def test_intersection() -> None:
    assert intersect(((0, 4), (2, 6)), ((3, 9), (0, 3))) == ((3, 4), (2, 3))
    assert intersect(((0, 4),), ((4, 9),)) is None
