"""Rectangles in and out of safetensors files, and headers that are not believed."""

import json
import struct
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from r1mega.weights.regions import Region, extent, whole
from r1mega.weights.tensor_file import (
    DTYPES,
    TensorFile,
    TensorFileError,
    digest_file,
    digest_tensor,
    read_header,
    runs,
)


@st.composite
def rectangles(draw: st.DrawFn) -> tuple[tuple[int, ...], Region]:
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=0, max_size=4)))
    region = []
    for size in shape:
        start = draw(st.integers(0, size - 1))
        region.append((start, draw(st.integers(start, size))))
    return shape, tuple(region)


@given(rectangles())
def test_runs_are_the_rectangle_and_as_long_as_can_be(
    rectangle: tuple[tuple[int, ...], Region],
) -> None:
    shape, region = rectangle
    numbers = torch.arange(prod(shape)).reshape(shape)
    wanted = numbers[tuple(slice(*span) for span in region)].flatten().tolist()
    found = list(runs(shape, region))
    assert [i for offset, length in found for i in range(offset, offset + length)] == wanted
    ends = {offset + length for offset, length in found}
    assert not ends & {offset for offset, _ in found}  # no two could be one


def test_reads_what_safetensors_wrote_and_the_other_way(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        name: torch.randn(5, 7).mul(9).to(dtype)
        for name, dtype in DTYPES.items()
        if dtype is not torch.bool
    }
    tensors |= {"flags": torch.rand(3) > 0.5, "scalar": torch.tensor(2.5), "none": torch.ones(0, 3)}
    save_file(tensors, tmp_path / "a")
    region = ((1, 4), (2, 6))
    with TensorFile.open(tmp_path / "a") as file:
        shapes = {key: (entry.dtype, entry.shape) for key, entry in file.entries.items()}
        with TensorFile.create(tmp_path / "b", shapes) as copy:
            for key, tensor in tensors.items():
                assert digest_tensor(file.read(key)) == digest_tensor(tensor)
                copy.write(key, whole(tensor.shape), file.read(key))
                if tensor.shape == (5, 7):
                    part = tensor[1:4, 2:6].contiguous()
                    assert digest_tensor(file.read(key, region)) == digest_tensor(part)
    again = load_file(tmp_path / "b")
    assert again.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert digest_tensor(again[key]) == digest_tensor(tensor)


def test_a_rectangle_written_leaves_the_rest(tmp_path: Path) -> None:
    with TensorFile.create(tmp_path / "a", {"x": ("F32", (3, 4)), "y": ("I64", (2,))}) as file:
        file.write("x", ((1, 3), (1, 3)), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        with pytest.raises(ValueError, match=r"y\[\(0, 2\)\] is I64 \[2\], but got torch.float32"):
            file.write("y", ((0, 2),), torch.zeros(2))
    wanted = torch.zeros(3, 4)
    wanted[1:, 1:3] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert torch.equal(load_file(tmp_path / "a")["x"], wanted)


def test_digest_sees_any_flipped_bit(tmp_path: Path) -> None:
    path = tmp_path / "a"
    save_file({"x": torch.randn(40)}, path)
    content, before = path.read_bytes(), digest_file(path)
    for position in range(0, 8 * len(content), 7):
        damaged = bytearray(content)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        assert digest_file(path) != before


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"{}" + b"stray",
        struct.pack("<Q", 9) + b'{"a":null',
    ],
    ids=["empty", "short", "endless header", "a list", "bytes that nothing names", "torn"],
)
def test_a_header_that_does_not_account_for_the_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(TensorFileError, match="a is damaged"):
        read_header(tmp_path / "a")


@pytest.mark.parametrize(
    ("span", "why"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "does not lie where it should"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, "does not lie where it should"),
        ({"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}, "x is F31"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}, r"x is F32 \[-1\]"),
        ({"dtype": "F32", "shape": "no", "data_offsets": [0, 4]}, "header cannot be read"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "expected"),
    ],
)
def test_a_tensor_that_is_not_where_it_says(
    span: dict[str, object], why: str, tmp_path: Path
) -> None:
    header = json.dumps({"x": span}).encode()
    (tmp_path / "a").write_bytes(struct.pack("<Q", len(header)) + header + b"1234")
    with pytest.raises(TensorFileError, match=why):
        TensorFile.open(tmp_path / "a")


def test_extent() -> None:
    assert extent(((1, 4), (0, 2))) == [3, 2]
