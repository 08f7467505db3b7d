"""DeepSeek-V3's routed experts (arXiv 2412.19437): every token through its chosen few.

Tokens are sorted by expert; padding rows bring every expert to a multiple of ``EXPERT_ROWS``, so
that one grouped product does all of them and a token's bits ignore who else chose its expert.
Where a token chooses half of the experts or more, every expert computes every token and the others
weigh zero: twice the arithmetic in two whole products is faster than all the small ones.

Legend: N tokens, D hidden, E experts, F width of an expert, K experts per token, S = N * K rows and
padding, G = 2 * E * F.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from r1mega.config.schema import Model
from r1mega.rollout.engine.products import grouped, linear
from r1mega.rollout.engine.weights import MlpWeights, MoeWeights

EXPERT_ROWS = 8
_COMPUTE_ALL_UP_TO = 2  # experts per chosen one (measured with 64 tokens)


@dataclass(frozen=True, slots=True)
class Routed:
    """The experts of every token, likeliest first, and the weight of each."""

    experts_NK: Tensor
    weights_NK: Tensor


def gated(gate_up: Tensor) -> Tensor:
    """SwiGLU of (..., 2 * width), gate first."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


def route(model: Model, moe: MoeWeights, x_ND: Tensor) -> Routed:
    """A group of experts is scored by its two best, as Hugging Face does."""
    scores_NE = linear(x_ND, moe.router).sigmoid()
    choice_NE = scores_NE + moe.router_bias
    if model.topk_group < model.n_group:
        grouped = choice_NE.unflatten(-1, (model.n_group, -1))
        group_scores = grouped.topk(2, dim=-1).values.sum(dim=-1)
        kept = group_scores.topk(model.topk_group, dim=-1).indices
        dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, kept, False)
        choice_NE = grouped.masked_fill(dropped[:, :, None], float("-inf")).flatten(1)
    experts_NK = choice_NE.topk(model.num_experts_per_tok, dim=-1).indices
    weights_NK = scores_NE.gather(1, experts_NK)
    weights_NK = weights_NK / (weights_NK.sum(dim=-1, keepdim=True) + 1e-20)
    return Routed(experts_NK, weights_NK * model.routed_scaling_factor)


def mix(experts: MlpWeights, routed: Routed, x_ND: Tensor) -> Tensor:
    """The weighted sum of what the chosen experts make of each token."""
    if len(experts.gate_up) <= _COMPUTE_ALL_UP_TO * routed.experts_NK.shape[1]:
        return mix_all(experts, routed, x_ND)
    return mix_chosen(experts, routed, x_ND)


def mix_all(experts: MlpWeights, routed: Routed, x_ND: Tensor) -> Tensor:
    """``mix`` with all experts as one MLP whose inner values are weighed."""
    weights_NE = x_ND.new_zeros(len(x_ND), len(experts.gate_up))
    weights_NE.scatter_(1, routed.experts_NK, routed.weights_NK)
    gate_up_NG = linear(x_ND, experts.gate_up.flatten(0, 1))
    inner_NEF = gated(gate_up_NG.unflatten(1, (weights_NE.shape[1], -1))).mul_(
        weights_NE[:, :, None]
    )
    return linear(inner_NEF.flatten(1), experts.down.transpose(0, 1).flatten(1))


def mix_chosen(experts: MlpWeights, routed: Routed, x_ND: Tensor) -> Tensor:
    """``mix`` with the rows of every expert, and padding, side by side."""
    rows_NK, token_S, counts_E = _sort(routed.experts_NK.numpy(), len(experts.gate_up))
    inner_SF = gated(grouped(x_ND.index_select(0, token_S), experts.gate_up, counts_E))
    y_SD = grouped(inner_SF, experts.down, counts_E)
    return functional.embedding_bag(rows_NK, y_SD, mode="sum", per_sample_weights=routed.weights_NK)


def _sort(experts_NK: np.ndarray, num_experts: int) -> tuple[Tensor, Tensor, list[int]]:
    """Where every choice goes, the token of every row (any for padding), rows of every expert."""
    chosen = experts_NK.ravel()
    counts_E = np.bincount(chosen, minlength=num_experts)
    padding_E = -counts_E % EXPERT_ROWS
    sorted_by = np.concatenate([chosen, np.arange(num_experts).repeat(padding_E)])
    order_S = sorted_by.astype(np.uint16).argsort(kind="stable")  # 16 bits: by radix
    rows_S = np.empty_like(order_S)
    rows_S[order_S] = np.arange(len(order_S))
    token_S = np.minimum(order_S // experts_NK.shape[1], len(experts_NK) - 1)
    rows_NK = torch.from_numpy(rows_S[: len(chosen)].reshape(experts_NK.shape))
    return rows_NK, torch.from_numpy(token_S), (counts_E + padding_E).tolist()
