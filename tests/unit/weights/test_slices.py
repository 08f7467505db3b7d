"""The slice reader returns exactly the rectangle asked for, from either kind of folder."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from r1mega.weights import fp8
from r1mega.weights.regions import intersect
from r1mega.weights.slices import (
    FORMAT,
    Piece,
    SliceReader,
    StoredTensor,
    checkpoint_index,
    read_checkpoint_index,
)

TABLE = torch.arange(48, dtype=torch.float32).reshape(6, 8)
WHOLE = ((0, 6), (0, 8))
PARTS = {"a.safetensors": ((0, 6), (0, 3)), "b.safetensors": ((0, 6), (3, 8))}


@pytest.fixture(params=["single", "sharded", "checkpoint"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "single":
        save_file({"t": TABLE}, tmp_path / "model.safetensors")
    elif request.param == "sharded":
        save_file({"t": TABLE}, tmp_path / "x.safetensors")
        write_hf_index(tmp_path, {"t": "x.safetensors"})
    else:
        for file, (rows, columns) in PARTS.items():
            save_file({"t": TABLE[slice(*rows), slice(*columns)].contiguous()}, tmp_path / file)
        write_index(tmp_path, list(PARTS))
    return tmp_path


def write_hf_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_index(folder: Path, files: list[str], *, dtype: str = "F32") -> None:
    pieces = tuple(Piece(file, "t", PARTS[file], "0" * 32) for file in files)
    index = checkpoint_index({"t": StoredTensor((6, 8), pieces, dtype)})
    (folder / "index.json").write_text(index)


@pytest.mark.parametrize("region", [WHOLE, ((2, 5), (1, 7)), ((5, 6), (4, 5)), ((1, 2), (3, 8))])
def test_reads_a_rectangle(folder: Path, region: tuple[tuple[int, int], ...]) -> None:
    with SliceReader(folder) as reader:
        rows, columns = region
        assert torch.equal(reader.read("t", (6, 8), region), TABLE[slice(*rows), slice(*columns)])


def test_says_what_is_wrong(folder: Path) -> None:
    with SliceReader(folder) as reader:
        with pytest.raises(
            ValueError, match="no tensor 'u'; is this a checkpoint of another model"
        ):
            reader.read("u", (6, 8), WHOLE)
        with pytest.raises(ValueError, match=r"t has shape \[6, 8\] but the model wants \[8, 6\]"):
            reader.read("t", (8, 6), WHOLE)


def test_a_piece_without_a_digest_is_refused(tmp_path: Path) -> None:
    write_index(tmp_path, list(PARTS))
    path = tmp_path / "index.json"
    path.write_text(path.read_text().replace("0" * 32, "", 1))
    with pytest.raises(ValueError, match="a piece has no digest"):
        SliceReader(tmp_path)


def test_a_tensor_stored_in_part_is_refused(tmp_path: Path) -> None:
    save_file({"t": TABLE[:, :3].contiguous()}, tmp_path / "a.safetensors")
    write_index(tmp_path, ["a.safetensors"])
    with pytest.raises(ValueError, match="t is not whole: its pieces hold 18 of its 48 elements"):
        SliceReader(tmp_path)


def test_an_index_that_does_not_describe_its_files_is_refused(tmp_path: Path) -> None:
    for file, (rows, columns) in PARTS.items():
        save_file({"t": TABLE[slice(*rows), slice(*columns)].contiguous()}, tmp_path / file)
    write_index(tmp_path, list(PARTS), dtype="BF16")
    message = r"t is F32 \[6, 3\], but the index says BF16 \[6, 3\]"
    with SliceReader(tmp_path) as reader, pytest.raises(ValueError, match=message):
        reader.read("t", (6, 8), WHOLE)


def test_an_empty_folder_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name a Hugging Face folder"):
        SliceReader(tmp_path)


def test_a_missing_file_and_a_missing_entry_are_named(tmp_path: Path) -> None:
    save_file({"t": TABLE}, tmp_path / "x.safetensors")
    write_hf_index(tmp_path, {"t": "x.safetensors", "u": "y.safetensors"})
    with pytest.raises(ValueError, match=r"y\.safetensors cannot be read: No such file"):
        SliceReader(tmp_path)
    write_hf_index(tmp_path, {"t": "x.safetensors", "u": "x.safetensors"})
    with pytest.raises(ValueError, match=r"x\.safetensors lacks u"):
        SliceReader(tmp_path)


def test_the_index_says_the_same_when_read_again(tmp_path: Path) -> None:
    tensors = {
        "t": StoredTensor((6, 8), (Piece("a", "t", WHOLE, "f" * 32),), "F8_E4M3"),
        "scalar": StoredTensor((), (Piece("a", "scalar", (), "e" * 32),), "F32"),
    }
    (tmp_path / "index.json").write_text(checkpoint_index(tensors))
    assert read_checkpoint_index(tmp_path) == tensors
    older = checkpoint_index(tensors).replace(FORMAT, "r1mega-checkpoint-1")
    (tmp_path / "index.json").write_text(older)
    with pytest.raises(ValueError, match="format 'r1mega-checkpoint-1', but this version reads"):
        read_checkpoint_index(tmp_path)


def fp8_folder(folder: Path, *, scales: torch.Tensor | None) -> torch.Tensor:
    """Holds ``t``, 200 x 300 codes; returns the weights that they and their own scales mean."""
    torch.manual_seed(0)
    codes, own_scales = fp8.quantize(torch.randn(200, 300))
    tensors = {"t": codes} | ({} if scales is None else {"t_scale_inv": scales})
    save_file(tensors, folder / "model.safetensors")
    return fp8.dequantize(codes, own_scales)


def test_fp8_weights_are_read_as_numbers_and_kept_as_codes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    _, scales = fp8.quantize(torch.randn(200, 300))
    weights = fp8_folder(tmp_path, scales=scales)
    region = ((100, 140), (130, 299))
    with SliceReader(tmp_path) as reader:
        assert torch.equal(reader.read("t", (200, 300), region), weights[100:140, 130:299])
        stored = reader.read_stored("t", region)
    codes = load_file(tmp_path / "model.safetensors")["t"][100:140, 130:299]
    assert torch.equal(stored.view(torch.uint8), codes.view(torch.uint8))


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        (None, "without its scales 't_scale_inv'"),
        (torch.ones(2, 2), r"F32 \[2, 2\], but blocks of 128 x 128 have F32 \[2, 3\]"),
        (torch.ones(2, 3).bfloat16(), r"BF16 \[2, 3\], but blocks of 128 x 128 have F32 \[2, 3\]"),
    ],
)
def test_codes_without_right_scales_are_refused(
    tmp_path: Path, scales: torch.Tensor | None, message: str
) -> None:
    fp8_folder(tmp_path, scales=scales)
    with SliceReader(tmp_path) as reader, pytest.raises(ValueError, match=message):
        reader.read("t", (200, 300), ((0, 1), (0, 1)))


def test_a_dtype_that_is_no_weights_is_refused(tmp_path: Path) -> None:
    save_file({"t": torch.arange(3)}, tmp_path / "model.safetensors")
    with SliceReader(tmp_path) as reader, pytest.raises(ValueError, match="t is stored as I64"):
        reader.read("t", (3,), ((0, 3),))


def test_intersection() -> None:
    assert intersect(((0, 4), (2, 6)), ((3, 9), (0, 3))) == ((3, 4), (2, 3))
    assert intersect(((0, 4),), ((4, 9),)) is None
