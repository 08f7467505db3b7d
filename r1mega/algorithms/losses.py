"""The equations: pure functions of target rows, summed with the weights each row carries.

Shapes: R target rows of a microbatch (all targets of all its sequences, in order).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from r1mega.learner.microbatch import Microbatch
from r1mega.learner.pipeline import LossOutput

BAND = math.log(2)  # policy / sampler outside [1/2, 2]: more than rounding
MAX_LOG_RATIO = 20.0  # exp(20): a sequence-level ratio beyond it says nothing a clip would not


def next_token_loss(logprobs_R: Tensor, entropies_R: Tensor, batch: Microbatch) -> LossOutput:
    """Weighted negative log-likelihood (SFT, pretraining)."""
    return LossOutput(
        loss=-(batch.weight_R * logprobs_R).sum(),
        sums={"policy/entropy": (batch.weight_R * entropies_R.detach()).sum()},
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ClippedSurrogate:
    """GRPO's objective (DeepSeek-R1, arXiv 2501.12948, eq. 1-2), negated.

    Per token or, with ``ratio="sequence"``, with the whole response's ratio:
    min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) - kl_coef * k3 + entropy_coef * entropy,
    rho = policy now / policy at sampling time. ``importance_cap`` multiplies by min(policy /
    sampler, cap), which corrects for engines that compute other numbers than the learner (truncated
    importance sampling).
    """

    clip_low: float
    clip_high: float
    kl_coef: float
    entropy_coef: float = 0.0
    ratio: Literal["token", "sequence"] = "token"
    importance_cap: float | None = None

    def __call__(self, logprobs_R: Tensor, entropies_R: Tensor, batch: Microbatch) -> LossOutput:
        # Without frozen log-probs this update is the first since sampling: rho is 1 and only its
        # gradient matters.
        policy_R = batch.policy_logprobs_R if len(batch.policy_logprobs_R) else logprobs_R.detach()
        log_ratio_R = logprobs_R - policy_R
        if self.ratio == "sequence":
            log_ratio_R = _sum_per_sequence(log_ratio_R, batch).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        rho_R = log_ratio_R.exp()
        clipped_R = rho_R.clamp(1 - self.clip_low, 1 + self.clip_high)
        unclipped_gain_R = rho_R * batch.advantage_R
        gain_R = torch.minimum(unclipped_gain_R, clipped_R * batch.advantage_R)
        is_clipped_R = gain_R < unclipped_gain_R
        mismatch_R = policy_R - batch.sampler_logprobs_R
        weight_R = batch.weight_R
        sums = {
            "mismatch/kl": (weight_R * k3(batch.sampler_logprobs_R, policy_R)).sum(),
            "mismatch/outside_band": (weight_R * (mismatch_R.abs() > BAND)).sum(),
        }
        if self.importance_cap is not None:
            importance_R = mismatch_R.exp()
            gain_R = gain_R * importance_R.clamp(max=self.importance_cap)
            sums["mismatch/capped"] = (weight_R * (importance_R > self.importance_cap)).sum()
        kl_R = torch.zeros_like(logprobs_R)
        if len(batch.reference_logprobs_R):
            kl_R = k3(logprobs_R, batch.reference_logprobs_R)
        objective_R = gain_R - self.kl_coef * kl_R
        if self.entropy_coef:
            objective_R = objective_R + self.entropy_coef * entropies_R
        rho_R = rho_R.detach()
        return LossOutput(
            loss=-(weight_R * objective_R).sum(),
            sums=sums
            | {
                "policy/entropy": (weight_R * entropies_R.detach()).sum(),
                "policy/kl": (weight_R * kl_R.detach()).sum(),
                "policy/ratio_mean": (weight_R * rho_R).sum(),
                "policy/clip_fraction": (weight_R * is_clipped_R).sum(),
            },
            maxima={"policy/ratio_max": _max(rho_R), "mismatch/max": _max(mismatch_R.abs())},
        )


def k3(policy_R: Tensor, reference_R: Tensor) -> Tensor:
    """Unbiased, non-negative estimator of KL(policy || reference): r - log r - 1, r = ref /
    policy."""
    log_r = reference_R - policy_R
    return torch.expm1(log_r) - log_r


def _sum_per_sequence(values_R: Tensor, batch: Microbatch) -> Tensor:
    """Every row gets the sum over its sequence."""
    totals = values_R.new_zeros(batch.num_sequences).index_add(0, batch.sequence_R, values_R)
    return totals[batch.sequence_R]


def _max(values_R: Tensor) -> Tensor:
    return values_R.max() if len(values_R) else values_R.new_zeros(())
