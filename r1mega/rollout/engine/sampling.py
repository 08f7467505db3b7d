"""Draw tokens from logits; a draw depends on (logits row, seed, position) only.

The uniform number of a token is a hash of its request's seed and its absolute position, and the
token is where the cumulative weights cross it. So a request gets the same tokens in any batch, and
a partial response that is continued elsewhere under the same seed continues the same stream.

Log-probs are log softmax(logits / temperature), before top-k, top-p, min-p and the suppression of
stop tokens. Temperature 0 takes the likeliest token and reports log-probs at temperature 1.

Legend: N rows to draw, R those whose distribution is restricted, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Choices:
    """How to draw one token for every row."""

    uniforms_N: np.ndarray  # float64 in [0, 1)
    temperatures_N: np.ndarray
    top_p_N: np.ndarray
    top_k_N: np.ndarray  # the vocabulary size: off
    min_p_N: np.ndarray
    suppressed_NV: np.ndarray | None = None  # tokens that must not be drawn

    def restricted(self, vocab_size: int) -> np.ndarray:
        """The rows that may not draw every token."""
        is_cut_N = (self.top_k_N < vocab_size) | (self.top_p_N < 1.0) | (self.min_p_N > 0.0)
        if self.suppressed_NV is not None:
            is_cut_N = is_cut_N | self.suppressed_NV.any(axis=1)
        return np.flatnonzero(is_cut_N)


@dataclass(frozen=True, slots=True)
class Drawn:
    """Tokens and log-probs; ``is_finite_N`` is False where the logits were not numbers."""

    token_ids_N: np.ndarray
    logprobs_N: np.ndarray
    is_finite_N: np.ndarray


def stream(seed: int) -> np.uint64:
    """What ``uniforms`` takes for a seed."""
    return _mix(np.array([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64))[0]


def uniforms(streams_N: np.ndarray, positions_N: np.ndarray) -> np.ndarray:
    """One number in [0, 1) per (stream, position): splitmix64's finalizer over both."""
    return (_mix(streams_N + positions_N.astype(np.uint64)) >> np.uint64(11)) * 2.0**-53


def _mix(state: np.ndarray) -> np.ndarray:
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def draw(logits_NV: Tensor, choices: Choices) -> Drawn:
    """One token per row."""
    temperatures_N1 = torch.from_numpy(choices.temperatures_N)[:, None]
    is_greedy_N1 = temperatures_N1 == 0.0
    scaled_NV = logits_NV / temperatures_N1.masked_fill(is_greedy_N1, 1.0)
    weights_NV = scaled_NV.softmax(dim=-1)
    cumulative_NV = weights_NV.cumsum(dim=-1, dtype=torch.float64)
    log_totals_N1 = cumulative_NV[:, -1:].log()  # exact sums: softmax's own are of float32

    allowed_NV = weights_NV
    if len(restricted := choices.restricted(weights_NV.shape[1])):
        rows = torch.from_numpy(restricted)
        allowed_NV = weights_NV.index_copy(0, rows, _restrict(weights_NV[rows], choices, rows))
        cumulative_NV[rows] = allowed_NV[rows].cumsum(dim=-1, dtype=torch.float64)
    tokens_N1 = _cross(cumulative_NV, torch.from_numpy(choices.uniforms_N)[:, None])
    if is_greedy_N1.any():
        likeliest_N1 = scaled_NV.masked_fill(allowed_NV == 0.0, -torch.inf).argmax(-1, keepdim=True)
        tokens_N1 = likeliest_N1.where(is_greedy_N1, tokens_N1)
    logprobs_N1 = weights_NV.gather(1, tokens_N1).double().log() - log_totals_N1
    logprobs_N = logprobs_N1.squeeze(1).numpy()
    return Drawn(tokens_N1.squeeze(1).numpy(), logprobs_N, np.isfinite(logprobs_N))


def _cross(cumulative_NV: Tensor, uniforms_N1: Tensor) -> Tensor:
    """The first token whose cumulative weight exceeds uniform * total."""
    totals_N1 = cumulative_NV[:, -1:]
    # Below the total by construction, so that rounding cannot step past the last positive weight.
    targets_N1 = (uniforms_N1 * totals_N1).minimum(totals_N1 * (1 - 2.0**-53))
    tokens_N1 = torch.searchsorted(cumulative_NV, targets_N1, right=True)
    return tokens_N1.clamp_(max=cumulative_NV.shape[1] - 1)


def _restrict(weights_RV: Tensor, choices: Choices, rows: Tensor) -> Tensor:
    """Zero what top-k, top-p and min-p exclude, all three on what is not suppressed."""

    def column(values_N: np.ndarray) -> Tensor:
        return torch.from_numpy(values_N)[rows, None]

    if choices.suppressed_NV is not None:
        weights_RV = weights_RV.masked_fill(torch.from_numpy(choices.suppressed_NV)[rows], 0.0)
    # numpy sorts values several times faster than torch sorts values with their indices
    ordered_RV = torch.from_numpy(np.sort(weights_RV.numpy())).flip(1)
    cumulative_RV = ordered_RV.cumsum(dim=1, dtype=torch.float64)
    is_kept_RV = cumulative_RV - ordered_RV <= column(choices.top_p_N) * cumulative_RV[:, -1:]
    is_kept_RV &= ordered_RV >= column(choices.min_p_N) * ordered_RV[:, :1]
    num_kept_R1 = is_kept_RV.sum(dim=1, keepdim=True).minimum(column(choices.top_k_N)).clamp_(min=1)
    least_R1 = ordered_RV.gather(1, num_kept_R1 - 1)
    is_above_RV, is_least_RV = weights_RV > least_R1, weights_RV == least_R1
    num_least_R1 = num_kept_R1 - is_above_RV.sum(dim=1, keepdim=True)
    is_least_RV &= is_least_RV.cumsum(dim=1) <= num_least_R1  # of equals, the first stay
    return weights_RV.where(is_above_RV | is_least_RV, 0.0)
