"""Microbatches through Megatron's pipeline schedules, with the loss as an argument.

The loss of a batch is a sum over target tokens whose weights are already global (records.Sequence),
so nothing is divided here: not by microbatches, not by dp. calculate_per_token_loss makes
Megatron's schedule and DDP add instead of average, and ``sum_gradients`` leaves out its division by
tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from r1mega.learner.microbatch import Microbatch


@dataclass(frozen=True, kw_only=True, slots=True)
class LossOutput:
    """A microbatch's loss (its part of the batch's sum) and what to report.

    ``sums`` are added over microbatches and ranks, of ``maxima`` the largest is kept; all scalars,
    detached, with the same keys for every microbatch.
    """

    loss: Tensor
    sums: dict[str, Tensor] = field(default_factory=dict)
    maxima: dict[str, Tensor] = field(default_factory=dict)


class Loss(Protocol):
    """Log-probs and entropies of a microbatch's targets [R], both with gradient, to its loss."""

    def __call__(
        self, logprobs_R: Tensor, entropies_R: Tensor, batch: Microbatch
    ) -> LossOutput: ...


class Auxiliary(Protocol):
    """A loss beside the policy's, of further log-probs that the model returns for the targets."""

    def __call__(self, logprobs_DR: Tensor, batch: Microbatch) -> LossOutput: ...


def run_pipeline(
    chunks: Sequence[torch.nn.Module],
    microbatches: list[Microbatch],
    *,
    loss: Loss | None,
    temperature: float,
    chunk_tokens: int,
    auxiliary: Auxiliary | None = None,
) -> list[Any]:
    """Forward (and backward when there is a loss) of all microbatches.

    Returns, on the last stage, one entry per microbatch in order: its LossOutput (the loss without
    the auxiliary one), or without a loss its log-probs [R]. Other stages return [].
    """

    def forward_step(
        feed: Iterator[Microbatch], model: torch.nn.Module
    ) -> tuple[Tensor, partial[tuple[Tensor, Tensor, Any]]]:
        microbatch = next(feed)
        out = model(
            tokens_T=microbatch.tokens_T,
            positions_T=microbatch.positions_T,
            packed=microbatch.packed,
            targets=microbatch.targets,
            temperature=temperature,
            chunk_tokens=chunk_tokens,
        )
        return out, partial(_finish, microbatch=microbatch, loss=loss, auxiliary=auxiliary)

    feeds = [iter(microbatches) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=feeds if len(feeds) > 1 else feeds[0],
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(microbatches),
        seq_length=1,  # unused: stages announce their shapes (variable_seq_lengths)
        micro_batch_size=1,
        forward_only=loss is None,
    )


def sum_gradients(chunks: Any, num_tokens: Tensor | None = None, **kwargs: Any) -> None:
    """Megatron's gradient reduction without its division by the number of tokens."""
    finalize_model_grads(chunks, None, **kwargs)


def _finish(
    rows_NR: Tensor, *, microbatch: Microbatch, loss: Loss | None, auxiliary: Auxiliary | None
) -> tuple[Tensor, Tensor, Any]:
    no_tokens = torch.zeros((), dtype=torch.int, device=rows_NR.device)
    logprobs_R, entropies_R = rows_NR[:2]
    if loss is None:
        return rows_NR.sum() * 0.0, no_tokens, logprobs_R.detach()
    result = loss(logprobs_R, entropies_R, microbatch)
    total, sums, maxima = result.loss, result.sums, result.maxima
    if auxiliary is not None:
        beside = auxiliary(rows_NR[2:], microbatch)
        total, sums, maxima = total + beside.loss, sums | beside.sums, maxima | beside.maxima
    return total, no_tokens, LossOutput(loss=result.loss.detach(), sums=sums, maxima=maxima)
