"""Group-relative advantages and token weights: pure arithmetic on plain numbers."""

from collections.abc import Sequence
from statistics import fmean, pstdev


def group_relative(rewards: Sequence[float]) -> list[float]:
    """(r - mean) / population std over one group (DeepSeek-R1, eq. 3); 0 when all are equal."""
    mean, std = fmean(rewards), pstdev(rewards)
    if std == 0.0:
        return [0.0] * len(rewards)
    return [(reward - mean) / std for reward in rewards]


def token_weights(lengths: Sequence[int], normalize: str) -> list[float]:
    """Weight of each target token of sequences with ``lengths`` targets; all targets sum to 1.

    "sample": mean over the tokens of a sample, then over samples (R1's eq. 1). "token": mean over
    all tokens of the batch.
    """
    if normalize == "token":
        return [1.0 / sum(lengths)] * len(lengths)
    return [1.0 / (len(lengths) * length) for length in lengths]
