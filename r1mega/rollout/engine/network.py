"""DeepSeek-V3 forward over a latent KV cache: one code path for prefill and decode.

A step is a flat list of tokens, each with its cache slot and position, of any mix of requests. A
token's bits depend on its own history only, because nothing it meets has a shape that depends on
its company:

- matrix products have a multiple of ``ROWS`` (``EXPERT_ROWS`` per expert) rows and widths that are
  multiples of ``WIDTH``: then the bits of a row do not depend on how many there are or on its place
  (measured with MKL, whose kernels for other shapes have row-dependent tails);
- elementwise loops end on whole vectors, so no row falls into a scalar tail;
- attention runs over the token's position rounded up to ``BUCKET``.

Legend: N tokens of the step (padded), T tokens of one bucket, H heads, D hidden, R kv rank,
P rotary dim, L bucket length, E experts, K experts per token, C rows per expert.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from r1mega.config.schema import Model
from r1mega.rollout.engine import rotary
from r1mega.rollout.engine.weights import LayerWeights, MlpWeights, MoeWeights, Weights

ROWS = 16
EXPERT_ROWS = 8
WIDTH = 4
BUCKET = 64
# transformers leaves the norms of the two latents at this value whatever rms_norm_eps says.
_LATENT_NORM_EPS = 1e-6
_GATHER_BYTES = 64 << 20  # attention over long buckets is cut so that gathered keys stay below this


@dataclass(frozen=True, slots=True)
class Attention:
    """Tokens whose positions share one bucket."""

    rows_T: Tensor
    slots_T: Tensor
    length: int
    mask_T1L: Tensor  # 0 at positions up to the token's own, else -inf


@dataclass(frozen=True, slots=True)
class Step:
    """Where every token of a forward goes. Rows beyond ``num_tokens`` are padding."""

    num_tokens: int
    token_ids_N: Tensor
    slots_N: Tensor
    positions_N: Tensor
    attention: tuple[Attention, ...]


def padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


class Network:
    """The forward of one model over one set of weights."""

    def __init__(self, model: Model, weights: Weights, num_positions: int) -> None:
        _check_widths(model)
        self.model = model
        self.weights = weights
        self.latent_dim = model.kv_lora_rank + model.qk_rope_head_dim
        self._cos, self._sin = rotary.tables(
            padded(num_positions, BUCKET),
            model.qk_rope_head_dim,
            model.rope_theta,
            model.rope_scaling,
        )
        head_dim = model.qk_nope_head_dim + model.qk_rope_head_dim
        self._scale = rotary.softmax_scale(head_dim, model.rope_scaling)

    def plan(
        self, token_ids: Sequence[int], slots: Sequence[int], positions: Sequence[int]
    ) -> Step:
        """Pad the step and group its tokens by attention bucket."""
        padding = [0] * (padded(len(token_ids), ROWS) - len(token_ids))
        slots_N = torch.tensor([*slots, *padding])
        positions_N = torch.tensor([*positions, *padding])
        rows_of: dict[int, list[int]] = {}
        for row, position in enumerate(positions):
            rows_of.setdefault(padded(position + 1, BUCKET), []).append(row)
        attention: list[Attention] = []
        for length, rows in rows_of.items():
            for rows_T in torch.tensor(rows).split(self._rows_at_once(length)):
                ahead = torch.arange(length) > positions_N[rows_T, None, None]
                mask_T1L = torch.zeros(ahead.shape).masked_fill_(ahead, float("-inf"))
                attention.append(Attention(rows_T, slots_N[rows_T], length, mask_T1L))
        return Step(
            num_tokens=len(token_ids),
            token_ids_N=torch.tensor([*token_ids, *padding]),
            slots_N=slots_N,
            positions_N=positions_N,
            attention=tuple(attention),
        )

    def _rows_at_once(self, length: int) -> int:
        return max(1, _GATHER_BYTES // (4 * length * self.latent_dim))

    def forward(self, step: Step, latents: Tensor) -> Tensor:
        """Hidden states after the last norm (N, D); writes the step's latents into the cache."""
        model = self.model
        x_ND = self.weights.embedding[step.token_ids_N]
        cos_NP, sin_NP = self._cos[step.positions_N], self._sin[step.positions_N]
        for layer, cache_SLC in zip(self.weights.layers, latents, strict=True):
            normed = _norm(x_ND, layer.input_norm, model.rms_norm_eps)
            x_ND = x_ND + self._attend(layer, normed, cos_NP, sin_NP, cache_SLC, step)
            normed = _norm(x_ND, layer.mlp_norm, model.rms_norm_eps)
            x_ND = x_ND + self._mlp(layer.mlp, normed)
        return _norm(x_ND, self.weights.norm, model.rms_norm_eps)

    def logits(self, hidden_ND: Tensor, rows: Sequence[int]) -> Tensor:
        """Logits of some rows, in front of padding rows."""
        padding = [rows[0]] * (padded(len(rows), ROWS) - len(rows))
        return functional.linear(hidden_ND[torch.tensor([*rows, *padding])], self.weights.head)

    def _attend(
        self,
        layer: LayerWeights,
        x_ND: Tensor,
        cos_NP: Tensor,
        sin_NP: Tensor,
        cache_SLC: Tensor,
        step: Step,
    ) -> Tensor:
        """MLA with the up-projections of keys and values absorbed into query and output."""
        model, heads = self.model, self.model.num_attention_heads
        rank, nope = model.kv_lora_rank, model.qk_nope_head_dim
        query, latent_NR, key_NP = functional.linear(x_ND, layer.down_proj).split(
            [layer.down_proj.shape[0] - self.latent_dim, rank, model.qk_rope_head_dim], dim=-1
        )
        if layer.q_norm is not None and layer.q_up_proj is not None:
            query = functional.linear(_norm(query, layer.q_norm, _LATENT_NORM_EPS), layer.q_up_proj)
        nope_NH, rotary_NHP = query.unflatten(-1, (heads, -1)).split(
            [nope, model.qk_rope_head_dim], dim=-1
        )
        latent_NR = _norm(latent_NR, layer.kv_norm, _LATENT_NORM_EPS)
        latent_NC = torch.cat([latent_NR, _rotate(key_NP, cos_NP, sin_NP)], dim=-1)
        n = step.num_tokens
        cache_SLC[step.slots_N[:n], step.positions_N[:n]] = latent_NC[:n]

        up_HXR = layer.kv_up_proj.view(heads, nope + model.v_head_dim, rank)
        absorbed_HNR = torch.bmm(nope_NH.transpose(0, 1), up_HXR[:, :nope])
        rotated_NHP = _rotate(rotary_NHP, cos_NP[:, None], sin_NP[:, None])
        query_NHC = torch.cat([absorbed_HNR.transpose(0, 1), rotated_NHP], dim=-1) * self._scale
        mixed_NHR = self._attention(query_NHC, cache_SLC, step, rank)
        value_HNV = torch.bmm(mixed_NHR.transpose(0, 1), up_HXR[:, nope:].transpose(1, 2))
        return functional.linear(value_HNV.transpose(0, 1).flatten(1), layer.out_proj)

    @staticmethod
    def _attention(query_NHC: Tensor, cache_SLC: Tensor, step: Step, rank: int) -> Tensor:
        mixed_NHR = query_NHC.new_zeros(*query_NHC.shape[:2], rank)
        for part in step.attention:
            keys_TLC = cache_SLC[:, : part.length].index_select(0, part.slots_T)
            scores_THL = torch.bmm(query_NHC[part.rows_T], keys_TLC.transpose(1, 2))
            weights_THL = (scores_THL + part.mask_T1L).softmax(dim=-1)
            mixed_NHR[part.rows_T] = torch.bmm(weights_THL, keys_TLC[:, :, :rank])
        return mixed_NHR

    def _mlp(self, mlp: MlpWeights | MoeWeights, x_ND: Tensor) -> Tensor:
        if isinstance(mlp, MlpWeights):
            return functional.linear(_gated(functional.linear(x_ND, mlp.gate_up)), mlp.down)
        return self._experts(mlp, x_ND) + self._mlp(mlp.shared, x_ND)

    def _experts(self, moe: MoeWeights, x_ND: Tensor) -> Tensor:
        """Every expert multiplies an equal number of rows: its tokens, then zeros."""
        weights_NK, experts_NK = self._route(moe, x_ND)
        num_experts, per_token = self.model.n_routed_experts, self.model.num_experts_per_tok
        chosen = experts_NK.flatten()[:, None]
        one_hot = chosen.new_zeros(chosen.shape[0], num_experts).scatter_(1, chosen, 1)
        rank_in_expert = one_hot.cumsum(0)
        capacity = padded(int(rank_in_expert[-1].max()), EXPERT_ROWS)
        row = (chosen * capacity + rank_in_expert.gather(1, chosen) - 1).squeeze(1)
        x_ECD = x_ND.new_zeros(num_experts * capacity, x_ND.shape[1])
        x_ECD[row] = x_ND.repeat_interleave(per_token, dim=0)
        x_ECD = x_ECD.view(num_experts, capacity, -1)
        inner_ECF = _gated(torch.bmm(x_ECD, moe.experts.gate_up.transpose(1, 2)))
        y_ECD = torch.bmm(inner_ECF, moe.experts.down.transpose(1, 2))
        y_NKD = y_ECD.flatten(0, 1)[row].unflatten(0, (-1, per_token))
        return (y_NKD * weights_NK[:, :, None]).sum(dim=1)

    def _route(self, moe: MoeWeights, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and ids of the chosen experts; a group is scored by its two best, as HF does."""
        model = self.model
        scores_NE = functional.linear(x_ND, moe.router).sigmoid()
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
        return weights_NK * model.routed_scaling_factor, experts_NK


def _check_widths(model: Model) -> None:
    names = (
        "hidden_size",
        "intermediate_size",
        "moe_intermediate_size",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
    )
    odd = [
        f"{name}={getattr(model, name)}" for name in names if (getattr(model, name) or 0) % WIDTH
    ]
    if odd:
        raise ValueError(
            f"{', '.join(odd)}: not a multiple of {WIDTH}, so a request's bits would depend on its "
            f"batch; use sizes that are multiples of {WIDTH}"
        )


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return functional.rms_norm(x, weight.shape, weight, eps)


def _gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs (x0, x1), (x2, x3), ...; the output has firsts, then seconds."""
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
