"""Attention over a cache, MLA's and grouped-query: both turn a token into queries and a cache row.

MLA (DeepSeek-V2, arXiv 2405.04434) with its up-projections absorbed is grouped-query attention with
a single key/value head whose values are the first numbers of its keys. So both share ``attend``,
and a cache of rows (layer, slot, key/value head, position, width).

Legend: N rows of the step (padded), n its tokens, T rows of one part, K key/value heads, G query
heads of each, H = K * G, C key width, V value width, W cache width, R kv rank, L keys, F = half the
rotary width, S slots, P positions.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from r1mega.config import network
from r1mega.config.schema import Model
from r1mega.rollout.engine import rotary
from r1mega.rollout.engine.plan import Part, Step
from r1mega.rollout.engine.products import linear
from r1mega.rollout.engine.weights import GqaWeights, MlaWeights

# transformers leaves the norms of the two latents at this value whatever rms_norm_eps says.
_LATENT_NORM_EPS = 1e-6


class Attention(Protocol):
    """One layer's attention: (N, D) in and out; writes the rows of the step's tokens."""

    def __call__(
        self, x_ND: Tensor, turns_NF: Tensor, step: Step, cache_SKPW: Tensor
    ) -> Tensor: ...


def cache_shape(model: Model) -> tuple[int, int]:
    """(key/value heads, width) of one token in one layer."""
    if network.is_dense(model):
        return network.key_value_heads(model), 2 * network.head_dim(model)
    return 1, model.kv_lora_rank + model.qk_rope_head_dim


def rotary_dim(model: Model) -> int:
    return network.head_dim(model) if network.is_dense(model) else model.qk_rope_head_dim


def layer_attention(model: Model, weights: MlaWeights | GqaWeights) -> Attention:
    return Mla(model, weights) if isinstance(weights, MlaWeights) else Gqa(model, weights)


class Mla:
    """A cache row is the normed kv latent, then the rotated key."""

    def __init__(self, model: Model, weights: MlaWeights) -> None:
        self._weights = weights
        self._heads = model.num_attention_heads
        self._nope, self._rank = model.qk_nope_head_dim, model.kv_lora_rank
        self._rope = model.qk_rope_head_dim
        self._scale = rotary.softmax_scale(self._nope + self._rope, model.rope_scaling)
        up_HXR = weights.kv_up_proj.unflatten(0, (self._heads, -1))
        self._key_up_HXR, self._value_up_HVR = up_HXR.split([self._nope, model.v_head_dim], dim=1)

    def __call__(self, x_ND: Tensor, turns_NF: Tensor, step: Step, cache_SKPW: Tensor) -> Tensor:
        query, latent_NR, key_NP = self._project(x_ND)
        nope_NHX, rotary_NHP = query.unflatten(-1, (self._heads, -1)).split(
            [self._nope, self._rope], dim=-1
        )
        turned_NJP = rotary.turn_pairs(torch.cat([rotary_NHP, key_NP[:, None]], dim=1), turns_NF)
        latent_NR = _norm(latent_NR, self._weights.kv_norm)
        row_NC = torch.cat([latent_NR, turned_NJP[:, -1]], dim=-1)
        _write(cache_SKPW, step, row_NC[:, None])
        absorbed_HNR = torch.bmm(nope_NHX.transpose(0, 1), self._key_up_HXR)
        query_NHC = torch.cat([absorbed_HNR.transpose(0, 1), turned_NJP[:, :-1]], dim=-1)
        mixed_NKHR = attend(
            query_NHC[:, None], cache_SKPW, step.parts, self._scale, slice(0, self._rank)
        )
        value_HNV = torch.bmm(mixed_NKHR[:, 0].transpose(0, 1), self._value_up_HVR.transpose(1, 2))
        return linear(value_HNV.transpose(0, 1).flatten(1), self._weights.out_proj)

    def _project(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of all heads, kv latent (not normed), key; neither of them rotated."""
        weights = self._weights
        down = linear(x_ND, weights.down_proj)
        query_dim = weights.down_proj.shape[0] - self._rank - self._rope
        query, latent_NR, key_NP = down.split([query_dim, self._rank, self._rope], dim=-1)
        if weights.q_norm is not None and weights.q_up_proj is not None:
            query = linear(_norm(query, weights.q_norm), weights.q_up_proj)
        return query, latent_NR, key_NP


class Gqa:
    """A cache row is, for every key/value head, the rotated key, then the value."""

    def __init__(self, model: Model, weights: GqaWeights) -> None:
        self._weights = weights
        self._heads, self._groups = model.num_attention_heads, network.key_value_heads(model)
        self._dim = network.head_dim(model)

    def __call__(self, x_ND: Tensor, turns_NF: Tensor, step: Step, cache_SKPW: Tensor) -> Tensor:
        weights = self._weights
        projected = linear(x_ND, weights.qkv, weights.qkv_bias)
        turning_NJC, value_NKC = projected.unflatten(-1, (-1, self._dim)).split(
            [self._heads + self._groups, self._groups], dim=1
        )
        query_NHC, key_NKC = rotary.turn_halves(turning_NJC, turns_NF).split(
            [self._heads, self._groups], dim=1
        )
        _write(cache_SKPW, step, torch.cat([key_NKC, value_NKC], dim=-1))
        query_NKGC = query_NHC.unflatten(1, (self._groups, -1))
        mixed_NKGV = attend(
            query_NKGC, cache_SKPW, step.parts, self._dim**-0.5, slice(self._dim, None)
        )
        return linear(mixed_NKGV.flatten(1), weights.out_proj, weights.out_bias)


def _write(cache_SKPW: Tensor, step: Step, row_NKW: Tensor) -> None:
    n = step.num_tokens
    cache_SKPW[step.slots_N[:n], :, step.positions_N[:n]] = row_NKW[:n]


def attend(
    query_NKGC: Tensor, cache_SKPW: Tensor, parts: tuple[Part, ...], scale: float, values: slice
) -> Tensor:
    """(N, K, G, V). Keys are the first C numbers of a cache row, values the slice ``values``."""
    width = query_NKGC.shape[-1]
    num_values = len(range(*values.indices(cache_SKPW.shape[-1])))
    mixed_NKGV = query_NKGC.new_zeros(*query_NKGC.shape[:-1], num_values)
    for part in parts:
        query_TKGC = query_NKGC[part.rows]
        rows_TKLW = cache_SKPW[part.slots, :, : part.length].expand(len(query_TKGC), -1, -1, -1)
        for head in range(query_NKGC.shape[1]):
            rows_TLW = rows_TKLW[:, head]
            keys_TCL = rows_TLW[..., :width].transpose(1, 2)
            scores_TGL = torch.baddbmm(part.mask_T1L, query_TKGC[:, head], keys_TCL, alpha=scale)
            mixed_NKGV[part.rows, head] = torch.bmm(scores_TGL.softmax(-1), rows_TLW[..., values])
    return mixed_NKGV


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return functional.rms_norm(x, weight.shape, weight, _LATENT_NORM_EPS)
