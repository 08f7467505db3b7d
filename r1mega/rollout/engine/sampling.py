"""Draw tokens from logits; a draw depends on (logits row, seed, position) only.

The uniform number of a token is a hash of its request's seed and its absolute position, and the
token is where the cumulative weights cross it. So a request gets the same tokens in any batch, and
a partial response that is continued elsewhere under the same seed continues the same stream.

Log-probs are log softmax(logits / temperature), before top-k, top-p, min-p and the suppression of
stop tokens. Temperature 0 takes the likeliest token and reports log-probs at temperature 1.

Legend: N rows (the first ``len(choices)`` count), V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Choice:
    """How to draw one token."""

    seed: int
    position: int
    temperature: float
    top_p: float = 1.0
    top_k: int = -1  # -1: off
    min_p: float = 0.0
    suppressed: tuple[int, ...] = ()  # tokens that must not be drawn

    @property
    def truncates(self) -> bool:
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


@dataclass(frozen=True, slots=True)
class Drawn:
    """A token and its log-prob; ``finite`` is False when the row's logits were not numbers."""

    token_id: int
    logprob: float
    finite: bool


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> Tensor:
    """One number in [0, 1) per (seed, position): splitmix64's finalizer over both."""
    with np.errstate(over="ignore"):
        state = _mix(np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds], dtype=np.uint64))
        state = _mix(state + np.array(positions, dtype=np.uint64))
    return torch.from_numpy((state >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def _mix(state: np.ndarray) -> np.ndarray:
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def draw(logits_NV: Tensor, choices: Sequence[Choice]) -> list[Drawn]:
    """One token per choice."""
    num_padding = logits_NV.shape[0] - len(choices)
    temperatures = [choice.temperature or 1.0 for choice in choices]
    scaled_NV = logits_NV / torch.tensor([*temperatures, *[1.0] * num_padding])[:, None]
    peaks_N1 = scaled_NV.amax(dim=-1, keepdim=True)
    weights_NV = (scaled_NV - peaks_N1).exp_()
    cumulative_NV = weights_NV.cumsum(dim=-1, dtype=torch.float64)
    log_totals_N = cumulative_NV[:, -1].log()

    special = [row for row, choice in enumerate(choices) if choice.suppressed or choice.truncates]
    for row in special:
        weights_NV[row] = _restrict(weights_NV[row], choices[row])
    if special:
        cumulative_NV[special] = weights_NV[special].cumsum(dim=-1, dtype=torch.float64)
    tokens_N = _cross(cumulative_NV[: len(choices)], choices)
    greedy = [row for row, choice in enumerate(choices) if choice.temperature == 0.0]
    if greedy:
        allowed_NV = scaled_NV[greedy].masked_fill(weights_NV[greedy] == 0.0, float("-inf"))
        tokens_N[greedy] = allowed_NV.argmax(dim=-1)

    rows = torch.arange(len(choices))
    logprobs_N = (scaled_NV[rows, tokens_N] - peaks_N1[rows, 0]).double() - log_totals_N[rows]
    finite_N = log_totals_N[rows].isfinite() & logprobs_N.isfinite()
    drawn = zip(tokens_N.tolist(), logprobs_N.tolist(), finite_N.tolist(), strict=True)
    return [Drawn(*values) for values in drawn]


def _cross(cumulative_NV: Tensor, choices: Sequence[Choice]) -> Tensor:
    """The first token whose cumulative weight exceeds uniform * total."""
    uniforms_N = uniforms([c.seed for c in choices], [c.position for c in choices])
    totals_N1 = cumulative_NV[:, -1:]
    # Below the total by construction, so that rounding cannot step past the last positive weight.
    targets_N1 = (uniforms_N[:, None] * totals_N1).minimum(totals_N1 * (1 - 2.0**-53))
    tokens_N = torch.searchsorted(cumulative_NV, targets_N1, right=True).squeeze(1)
    return tokens_N.clamp_(max=cumulative_NV.shape[1] - 1)


def _restrict(weights_V: Tensor, choice: Choice) -> Tensor:
    """Zero what top-k, top-p and min-p exclude, all three on the unrestricted distribution."""
    if choice.suppressed:
        weights_V = weights_V.index_fill(0, torch.tensor(choice.suppressed), 0.0)
    if not choice.truncates:
        return weights_V
    # numpy sorts values several times faster than torch sorts values with their indices
    ordered_V = torch.from_numpy(np.sort(weights_V.numpy())).flip(0)
    cumulative_V = ordered_V.cumsum(dim=0, dtype=torch.float64)
    kept_V = cumulative_V - ordered_V <= choice.top_p * cumulative_V[-1]
    kept_V &= ordered_V >= choice.min_p * ordered_V[0]
    num_kept = int(kept_V.sum())
    if choice.top_k > 0:
        num_kept = min(num_kept, choice.top_k)
    least = ordered_V[num_kept - 1]
    ties = (weights_V == least).nonzero().squeeze(1)
    num_ties_kept = num_kept - int((weights_V > least).sum())
    restricted_V = weights_V.where(weights_V >= least, 0.0)
    return restricted_V.index_fill_(0, ties[num_ties_kept:], 0.0)  # of equals, the first stay
