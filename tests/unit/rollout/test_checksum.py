"""SGLang's two checksums, against values that its own code gave."""

import hashlib
import struct

import pytest
import torch

from r1mega.rollout.checksum import cpu_checksum, cuda_checksum


def test_on_a_cpu_it_is_the_sha256_of_the_bytes() -> None:
    expected = hashlib.sha256(struct.pack("<3f", 1.0, 2.0, 3.5)).hexdigest()[:16]
    assert cpu_checksum(torch.tensor([1.0, 2.0, 3.5])) == expected
    assert cpu_checksum(torch.tensor([[1.0, 9.0], [2.0, 9.0], [3.5, 9.0]])[:, 0]) == expected


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [
        (1, "3d93a6540b54ef2a"),
        (2, "5e3bf04e746b3a20"),
        (10, "df4dbf4abc50bd01"),
        (4 * 8192, "6879cd6080660f1d"),  # a tile
        (120_003, "8627aec1bc6b4fc9"),  # several, the last one not full
    ],
)
def test_on_a_gpu_it_is_what_sglangs_kernel_computes(num_bytes: int, expected: str) -> None:
    """Values of SGLang 0.5.23's gpu_tensor_hash.py under Triton's interpreter."""
    assert cuda_checksum((torch.arange(num_bytes) * 37 % 251).to(torch.uint8)) == expected


def test_parts_of_a_large_tensor_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(5 * 8192 + 3)
    at_once = cuda_checksum(values)
    monkeypatch.setattr("r1mega.rollout.checksum._TILES_AT_ONCE", 2)
    assert cuda_checksum(values) == at_once != cuda_checksum(values.flip(0))
