"""DeepSeek-V3's FP8 weights: e4m3 codes, and one fp32 scale for every block of 128 x 128.

A weight is ``code * scale``; the scale of a block is its largest magnitude / 448, the largest code
(DeepSeek-V3 report, section 3.3; ``weight_dequant`` and ``act_quant`` in DeepSeek-V3's
inference/kernel.py). A block that was quantised so comes back from bf16 with equal codes and a
scale within 2^-8. Pure maths on the device of its arguments. Shape suffixes: R, C rows and columns
of a weight, S, T rows and columns of blocks, B rows or columns of one block.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from r1mega.weights.blocks import BLOCK

LARGEST = 448.0  # of e4m3
CODES = "F8_E4M3"  # safetensors' name
SCALES = "F32"


def quantize(weight_RC: Tensor) -> tuple[Tensor, Tensor]:
    """(codes [R, C] in e4m3, scales [S, T] in fp32) of a weight whose first element begins a block.

    A block without a magnitude that fp32 can scale, as one of zeros, has scale 1. Raises ValueError
    when a weight is not finite.
    """
    scaled_RC = weight_RC.to(torch.float32, copy=True)
    amax_ST = _block_amax(scaled_RC)
    if not bool(amax_ST.isfinite().all()):
        raise ValueError("a weight that is not finite has no FP8 form: use an earlier checkpoint")
    scales_ST = amax_ST / LARGEST
    scales_ST[scales_ST < torch.finfo(torch.float32).tiny] = 1.0
    _each_block(scaled_RC, scales_ST, (0, 0), Tensor.div_)
    return scaled_RC.to(torch.float8_e4m3fn), scales_ST


def dequantize(codes_RC: Tensor, scales_ST: Tensor, origin: tuple[int, int] = (0, 0)) -> Tensor:
    """Weights [R, C] in fp32. The codes are a slice at ``origin`` (row, column) of their tensor and
    may begin anywhere in a block; the scales are those of ``blocks.scale_region``."""
    return _each_block(codes_RC.float(), scales_ST, origin, Tensor.mul_)


def _block_amax(weight_RC: Tensor) -> Tensor:
    rows, columns = weight_RC.shape
    if rows % BLOCK or columns % BLOCK:
        weight_RC = pad(weight_RC, (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks_SBTB = weight_RC.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    return torch.maximum(blocks_SBTB.amax((1, 3)), -blocks_SBTB.amin((1, 3)))


def _each_block(
    values_RC: Tensor,
    scales_ST: Tensor,
    origin: tuple[int, int],
    combine: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """``values_RC``, combined in place with the scale of each one's block."""
    row, column = (start % BLOCK for start in origin)
    rows, columns = values_RC.shape
    scales_RT = scales_ST[torch.arange(row, row + rows, device=scales_ST.device) // BLOCK]
    for block, start in enumerate(range(-column, columns, BLOCK)):
        span = slice(max(start, 0), start + BLOCK)
        combine(values_RC[:, span], scales_RT[:, block : block + 1])
    return values_RC
