"""Rotary position tables with YaRN (arXiv 2309.00071), computed as transformers does."""

import math

import torch
from torch import Tensor

from r1mega.config.schema import RopeScaling


def tables(
    num_positions: int, dim: int, theta: float, scaling: RopeScaling | None
) -> tuple[Tensor, Tensor]:
    """cos and sin, each (num_positions, dim / 2)."""
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    factor = 1.0
    if scaling is not None:
        frequencies = _yarn(frequencies, dim, theta, scaling)
        factor = _mscale(scaling.factor, scaling.mscale) / _mscale(
            scaling.factor, scaling.mscale_all_dim
        )
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies
    return angles.cos() * factor, angles.sin() * factor


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
