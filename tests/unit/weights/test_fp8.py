"""FP8 blocks: DeepSeek's formula, any slice of them, and the way through bf16 and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from r1mega.weights.blocks import BLOCK, scale_region, scale_shape
from r1mega.weights.fp8 import dequantize, quantize

SIZES = st.integers(1, 300)


def drawn(rows: int, columns: int, seed: int) -> Tensor:
    """Magnitudes over several orders, so that every block has denormal codes too."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.empty(rows, columns).uniform_(-9, 3, generator=generator)
    return torch.randn(rows, columns, generator=generator) * 10**exponents


def bits(codes: Tensor) -> Tensor:
    return codes.view(torch.uint8)


@settings(max_examples=30, deadline=None)
@given(SIZES, SIZES, st.integers(0, 99))
def test_every_block_follows_the_published_formula(rows: int, columns: int, seed: int) -> None:
    weight = drawn(rows, columns, seed)
    codes, scales = quantize(weight)
    assert scales.shape == scale_shape((rows, columns))
    for i, j in [(0, 0), (scales.shape[0] - 1, scales.shape[1] - 1)]:
        block = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
        scale = weight[block].abs().max() / 448.0
        assert scales[i, j] == scale
        assert torch.equal(bits(codes[block]), bits((weight[block] / scale).to(codes.dtype)))
        assert torch.equal(dequantize(codes, scales)[block], codes[block].float() * scale)


@settings(max_examples=30, deadline=None)
@given(st.data(), SIZES, SIZES)
def test_a_slice_means_what_it_means_in_the_whole(
    data: st.DataObject, rows: int, columns: int
) -> None:
    codes, scales = quantize(drawn(rows, columns, 0))
    top, left = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    bottom, right = data.draw(st.integers(top, rows)), data.draw(st.integers(left, columns))
    (s0, s1), (t0, t1) = scale_region(((top, bottom), (left, right)))
    part = dequantize(codes[top:bottom, left:right], scales[s0:s1, t0:t1], (top, left))
    assert torch.equal(part, dequantize(codes, scales)[top:bottom, left:right])


@settings(max_examples=30, deadline=None)
@given(SIZES, SIZES, st.integers(0, 99))
def test_through_bf16_codes_are_equal_and_scales_near(rows: int, columns: int, seed: int) -> None:
    codes, scales = quantize(drawn(rows, columns, seed))
    again, scales_again = quantize(dequantize(codes, scales).bfloat16())
    assert torch.equal(bits(again), bits(codes))
    assert ((scales_again - scales).abs() <= scales * 2**-8).all()


def test_zero_and_tiny_blocks_stay_finite() -> None:
    weight = torch.zeros(130, 130)
    weight[129, 129] = 1e-45
    codes, scales = quantize(weight)
    assert scales.tolist() == [[1, 1], [1, 1]]
    assert not dequantize(codes, scales).any()


def test_what_is_not_finite_is_refused() -> None:
    for wrong in (float("nan"), float("inf"), -float("inf")):
        weight = torch.ones(2, 2)
        weight[1, 0] = wrong
        with pytest.raises(ValueError, match="not finite"):
            quantize(weight)
