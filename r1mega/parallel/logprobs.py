"""Output weight, log-prob, entropy and their gradients, fused in blocks: full logits never exist.

A block is the logits of some tokens with some rows of the weight; a token's softmax statistics are
carried from block to block (online softmax, arXiv 1805.02867). The loss may be any function of the
log-probs, so their gradient is known only in backward, which computes every block once more: four
products of the output layer's size instead of three, but all of them in cache, and no logits kept.

Shapes: T target tokens, H hidden, V this rank's slice of the vocabulary; C tokens and B vocabulary
rows of one block. Logits are divided by the temperature; all sums are fp32 (fp64 for fp64 inputs).
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from r1mega.parallel.backend import onednn_products

VOCAB_BLOCK = 4096


def vocab_parallel_logprobs(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    *,
    temperature: float,
    chunk_tokens: int,
    group: ProcessGroup,
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden @ weight.T / temperature) at the targets and its entropy (nats), both [T].

    ``weight_VH`` holds rows [rank * V, (rank + 1) * V) of the output layer. Both results are
    differentiable in hidden and weight; an entropy without a gradient costs nothing in backward.
    The gradient of ``hidden_TH`` is this rank's part: sum it over the group (Megatron's
    ``copy_to_tensor_model_parallel_region`` does). Beside the gradients themselves about three
    blocks of ``chunk_tokens`` x VOCAB_BLOCK fp32 numbers are held; on a CPU 256 tokens are fastest.
    """
    local_T = targets_T - group.rank() * len(weight_VH)
    return _FusedLogprobs.apply(hidden_TH, weight_VH, local_T, temperature, chunk_tokens, group)


class _FusedLogprobs(torch.autograd.Function):
    """``targets_T`` count from this rank's first row; outside [0, V) they are another rank's."""

    @staticmethod
    def forward(ctx, hidden_TH, weight_VH, targets_T, temperature, chunk_tokens, group):  # type: ignore[no-untyped-def]
        with onednn_products():
            max_T, sum_T, moment_T, target_T = _statistics(
                hidden_TH, weight_VH, targets_T, temperature, chunk_tokens
            )
        top_T = max_T.clone()
        dist.all_reduce(top_T, op=dist.ReduceOp.MAX, group=group)
        sums_3T = torch.stack([*_rebase(sum_T, moment_T, max_T - top_T), target_T])
        dist.all_reduce(sums_3T, group=group)
        sum_T, moment_T, target_T = sums_3T
        mean_T, log_sum_T = moment_T / sum_T, sum_T.log()
        ctx.save_for_backward(hidden_TH, weight_VH, targets_T, top_T, sum_T, mean_T)
        ctx.temperature, ctx.chunk_tokens = temperature, chunk_tokens
        return (target_T - top_T) - log_sum_T, log_sum_T - mean_T

    @staticmethod
    @onednn_products()
    def backward(ctx, grad_logprob_T, grad_entropy_T):  # type: ignore[no-untyped-def]
        hidden_TH, weight_VH, targets_T, top_T, sum_T, mean_T = ctx.saved_tensors
        grad_T = grad_logprob_T / ctx.temperature
        slope_T = grad_entropy_T / ctx.temperature if grad_entropy_T.any() else None
        grad_hidden_TH = torch.zeros_like(hidden_TH, dtype=top_T.dtype)
        grad_weight_VH = torch.empty_like(weight_VH) if ctx.needs_input_grad[1] else None
        for columns in _slices(len(weight_VH), VOCAB_BLOCK):
            weight_BH = weight_VH[columns]
            grad_BH = torch.zeros_like(weight_BH, dtype=top_T.dtype)
            for rows in _slices(len(hidden_TH), ctx.chunk_tokens):
                logits_CB = _logits(hidden_TH[rows], weight_BH, ctx.temperature)
                shifted_CB = logits_CB.sub_(top_T[rows, None])
                # With p the softmax: d logprob / d logits = onehot(target) - p and
                # d entropy / d logits = -p (log p + entropy) = -p (shifted - its mean under p).
                factor = grad_T[rows, None]
                if slope_T is not None:
                    factor = (shifted_CB - mean_T[rows, None]) * slope_T[rows, None] + factor
                grad_CB = shifted_CB.exp_().mul_(-factor / sum_T[rows, None])
                column_C, mine_C = _within(targets_T[rows], columns)
                grad_CB.scatter_add_(-1, column_C[:, None], (grad_T[rows] * mine_C)[:, None])
                grad_CB = grad_CB.to(weight_BH.dtype)
                _add_product(grad_hidden_TH[rows], grad_CB, weight_BH)
                if grad_weight_VH is not None:
                    _add_product(grad_BH, grad_CB.T, hidden_TH[rows])
            if grad_weight_VH is not None:
                grad_weight_VH[columns] = grad_BH
        return grad_hidden_TH.to(hidden_TH.dtype), grad_weight_VH, None, None, None, None


def _statistics(
    hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, temperature: float, chunk_tokens: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Over this rank's vocabulary, per token: the largest logit, the sum of exp(logit - largest),
    the same sum weighted by (logit - largest), and the target's logit or 0."""
    dtype = _sum_dtype(weight_VH)
    max_T = torch.full_like(targets_T, torch.finfo(dtype).min, dtype=dtype)
    sum_T, moment_T, target_T = (torch.zeros_like(max_T) for _ in range(3))
    for columns in _slices(len(weight_VH), VOCAB_BLOCK):
        for rows in _slices(len(hidden_TH), chunk_tokens):
            logits_CB = _logits(hidden_TH[rows], weight_VH[columns], temperature)
            column_C, mine_C = _within(targets_T[rows], columns)
            target_T[rows] += logits_CB.gather(-1, column_C[:, None]).squeeze(-1) * mine_C
            max_C = torch.maximum(max_T[rows], logits_CB.amax(-1))
            sum_C, moment_C = _rebase(sum_T[rows], moment_T[rows], max_T[rows] - max_C)
            shifted_CB = logits_CB.sub_(max_C[:, None])
            exp_CB = shifted_CB.exp()
            max_T[rows] = max_C
            sum_T[rows] = sum_C + exp_CB.sum(-1)
            moment_T[rows] = moment_C + exp_CB.mul_(shifted_CB).sum(-1)
    return max_T, sum_T, moment_T, target_T


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _logits(hidden_CH: Tensor, weight_BH: Tensor, temperature: float) -> Tensor:
    """One block; the product's own scaling divides by the temperature."""
    unread = hidden_CH.new_empty(1)
    product_CB = torch.addmm(unread, hidden_CH, weight_BH.T, beta=0, alpha=1 / temperature)
    return product_CB.to(_sum_dtype(weight_BH))


def _within(targets_C: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Targets as columns of a block (0 where they are not in it), and whether they are in it."""
    column_C = targets_C - columns.start
    mine_C = (column_C >= 0) & (column_C < columns.stop - columns.start)
    return column_C * mine_C, mine_C


def _rebase(sum_T: Tensor, moment_T: Tensor, shift_T: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of exp(x) and of x exp(x) after x -> x + shift."""
    scale_T = shift_T.exp()
    return scale_T * sum_T, scale_T * (moment_T + shift_T * sum_T)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right in the dtype of total."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:  # no such product on a CPU: rounded to the dtype of left and right first
        total += left @ right
