"""Rotary positions as complex numbers; YaRN and Llama 3's scaling computed as transformers does.

A pair (a, b) of a vector's numbers is a + ib, and rotating it is one complex product. The order of
a rotated vector's numbers is ours: queries and keys have it alike, and nobody else sees it.
"""

import math

import torch
from torch import Tensor

from r1mega.config.schema import RopeScaling


def turns(num_positions: int, dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Complex (num_positions, dim / 2): what every pair is multiplied with."""
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    factor = 1.0
    if scaling is not None and scaling.rope_type == "llama3":
        frequencies = _llama3(frequencies, scaling)
    elif scaling is not None:
        frequencies = _yarn(frequencies, dim, theta, scaling)
        factor = _mscale(scaling.factor, scaling.mscale) / _mscale(
            scaling.factor, scaling.mscale_all_dim
        )
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies
    return torch.complex(angles.cos() * factor, angles.sin() * factor)


def turn_pairs(x_NHP: Tensor, turns_NF: Tensor) -> Tensor:
    """Rotate pairs of neighbours, as DeepSeek-V3 has them; x is contiguous."""
    pairs = torch.view_as_complex(x_NHP.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns_NF[:, None]).flatten(-2)


def turn_halves(x_NHP: Tensor, turns_NF: Tensor) -> Tensor:
    """Rotate pairs of a number in the first and one in the second half, as Llama has them."""
    first, second = x_NHP.chunk(2, dim=-1)
    return torch.view_as_real(torch.complex(first, second) * turns_NF[:, None]).flatten(-2)


def softmax_scale(head_dim: int, scaling: RopeScaling | None) -> float:
    """1 / sqrt(head_dim), times YaRN's mscale squared."""
    mscale = 1.0 if scaling is None else _mscale(scaling.factor, scaling.mscale_all_dim)
    return head_dim**-0.5 * mscale * mscale


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn(frequencies: Tensor, dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """Interpolate slow frequencies, keep fast ones, with a linear ramp between."""

    def turning_dim(rotations: float) -> float:
        length = scaling.original_max_position_embeddings
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(turning_dim(scaling.beta_fast)), 0)
    high = min(math.ceil(turning_dim(scaling.beta_slow)), dim - 1)
    span = high - low or 0.001  # as transformers: no division by zero
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return frequencies / scaling.factor * ramp + frequencies * (1 - ramp)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Slow down what turns seldom in the original length, keep what turns often, blend between."""
    rotations = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((rotations - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)
