"""Multi-token prediction: the loss of the layers that predict further ahead.

Shapes: D MTP layers, R target rows of a microbatch.
"""

from dataclasses import dataclass

from torch import Tensor

from r1mega.learner.microbatch import Microbatch
from r1mega.learner.pipeline import LossOutput


@dataclass(frozen=True, kw_only=True, slots=True)
class MtpLoss:
    """DeepSeek-V3's eq. 24-25 (arXiv 2412.19437): weight / D times the sum over depths.

    Each target weighs what it weighs in the policy's loss; one that stands too near the beginning
    of its sequence to be predicted at some depth has log-prob 0 there.
    """

    weight: float

    def __call__(self, logprobs_DR: Tensor, batch: Microbatch) -> LossOutput:
        loss = -(batch.weight_R * logprobs_DR).sum() / len(logprobs_DR)
        return LossOutput(loss=self.weight * loss, sums={"mtp/loss": loss.detach()})
