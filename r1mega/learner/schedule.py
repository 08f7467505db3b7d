"""The learning rate of a step: pure arithmetic."""

from math import cos, pi
from typing import Literal


def learning_rate(
    step: int,
    *,
    lr: float,
    min_lr: float,
    warmup_steps: int,
    total_steps: int,
    schedule: Literal["constant", "cosine", "linear"],
) -> float:
    """Rate of update ``step`` (counted from 0): linear warm-up, then constant or decay to
    ``min_lr``."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if schedule == "constant":
        return lr
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    left = (1 + cos(pi * progress)) / 2 if schedule == "cosine" else 1 - progress
    return min_lr + (lr - min_lr) * left
