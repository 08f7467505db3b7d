"""Log-probs of a vocabulary-parallel output layer, in chunks: full logits never exist.

Shapes: T target tokens, C tokens of one chunk, H hidden, V this rank's slice of the vocabulary.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def vocab_parallel_logprobs(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    *,
    temperature: float,
    chunk_tokens: int,
    group: ProcessGroup,
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden @ weight.T / temperature) at the targets, and its entropy, both fp32 [T].

    ``weight_VH`` holds rows [rank * V, (rank + 1) * V) of the output layer. Differentiable in
    hidden and weight through the log-probs; the entropy is a measurement and carries no gradient.
    The gradient of ``hidden_TH`` is this rank's part: sum it over the group (Megatron's
    ``copy_to_tensor_model_parallel_region`` does).
    """
    return _ChunkedLogprobs.apply(hidden_TH, weight_VH, targets_T, temperature, chunk_tokens, group)


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TH, weight_VH, targets_T, temperature, chunk_tokens, group):  # type: ignore[no-untyped-def]
        logprobs, entropies, normalizers = [], [], []
        for rows in _chunks(hidden_TH.shape[0], chunk_tokens):
            logits_CV = _logits(hidden_TH[rows], weight_VH, temperature)
            local_C, mine_C = _local_targets(targets_T[rows], weight_VH.shape[0], group)
            max_C = logits_CV.amax(-1)
            dist.all_reduce(max_C, op=dist.ReduceOp.MAX, group=group)
            target_C = logits_CV.gather(-1, local_C[:, None]).squeeze(-1) * mine_C
            exp_CV = (logits_CV - max_C[:, None]).exp_()
            sums = torch.stack([exp_CV.sum(-1), (exp_CV * logits_CV).sum(-1), target_C])
            dist.all_reduce(sums, group=group)
            normalizer_C = max_C + sums[0].log()
            logprobs.append(sums[2] - normalizer_C)
            entropies.append(normalizer_C - sums[1] / sums[0])
            normalizers.append(normalizer_C)
        empty = hidden_TH.new_zeros(0, dtype=torch.float32)
        logprobs_T, entropies_T = torch.cat([empty, *logprobs]), torch.cat([empty, *entropies])
        ctx.save_for_backward(hidden_TH, weight_VH, targets_T, torch.cat([empty, *normalizers]))
        ctx.temperature, ctx.chunk_tokens, ctx.group = temperature, chunk_tokens, group
        ctx.mark_non_differentiable(entropies_T)
        return logprobs_T, entropies_T

    @staticmethod
    def backward(ctx, grad_T, _):  # type: ignore[no-untyped-def]
        hidden_TH, weight_VH, targets_T, normalizer_T = ctx.saved_tensors
        grad_hidden_TH = torch.empty_like(hidden_TH)
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32)
        for rows in _chunks(hidden_TH.shape[0], ctx.chunk_tokens):
            logits_CV = _logits(hidden_TH[rows], weight_VH, ctx.temperature)
            local_C, mine_C = _local_targets(targets_T[rows], weight_VH.shape[0], ctx.group)
            # d logprob / d logits = onehot(target) - softmax
            grad_CV = logits_CV.sub_(normalizer_T[rows, None]).exp_().neg_()
            grad_CV.scatter_add_(-1, local_C[:, None], mine_C[:, None])
            grad_CV.mul_(grad_T[rows, None] / ctx.temperature)
            grad_CV = grad_CV.to(weight_VH.dtype)
            grad_hidden_TH[rows] = grad_CV @ weight_VH
            grad_weight_VH += grad_CV.T @ hidden_TH[rows]
        return grad_hidden_TH, grad_weight_VH.to(weight_VH.dtype), None, None, None, None


def _chunks(num_tokens: int, chunk_tokens: int) -> list[slice]:
    return [
        slice(start, min(start + chunk_tokens, num_tokens))
        for start in range(0, num_tokens, chunk_tokens)
    ]


def _logits(hidden_CH: Tensor, weight_VH: Tensor, temperature: float) -> Tensor:
    return (hidden_CH @ weight_VH.T).float() / temperature


def _local_targets(
    targets_C: Tensor, vocab_slice: int, group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Targets as columns of this rank's slice, and 1.0 where the target is ours."""
    local_C = targets_C - group.rank() * vocab_slice
    mine_C = (local_C >= 0) & (local_C < vocab_slice)
    return local_C.clamp(0, vocab_slice - 1), mine_C.float()
