"""The forward of DeepSeek-V3, Llama and Qwen2 over a cache: one path for prompts and decoding.

A step is a flat list of tokens, each with its cache slot and position, of any mix of requests. A
token's bits depend on its own history only, because nothing it meets has a shape that depends on
its company:

- matrix products have a multiple of ``ROWS`` (``EXPERT_ROWS`` per expert) rows and widths that are
  multiples of ``WIDTH``: then the bits of a row do not depend on how many there are or on its place
  (measured with MKL and oneDNN, whose kernels for few rows differ);
- elementwise loops end on whole vectors, so no row falls into a scalar tail;
- attention is one small product per token, over its position rounded up to ``BUCKET``.

Legend: N tokens of the step (padded), D hidden, F half the rotary width, S slots, P positions,
K key/value heads, W cache width, V vocabulary.
"""

from torch import Tensor
from torch.nn import functional

from r1mega.config import network
from r1mega.config.schema import Model
from r1mega.rollout.engine import experts, rotary
from r1mega.rollout.engine.attention import layer_attention, rotary_dim
from r1mega.rollout.engine.cache import Cache
from r1mega.rollout.engine.plan import BUCKET, ROWS, Step, padded
from r1mega.rollout.engine.products import linear
from r1mega.rollout.engine.weights import MlpWeights, MoeWeights, Weights

WIDTH = 4


class Network:
    """The forward of one model over one set of weights."""

    def __init__(self, model: Model, weights: Weights, num_positions: int) -> None:
        _check_widths(model)
        self.model = model
        self.weights = weights
        self._attention = [layer_attention(model, layer.attention) for layer in weights.layers]
        self._turns_PF = rotary.turns(
            padded(num_positions, BUCKET), rotary_dim(model), model.rope_theta, model.rope_scaling
        )

    def forward(self, step: Step, cache: Cache) -> Tensor:
        """Hidden states after the last norm (N, D); what the step computes goes into the cache."""
        eps = self.model.rms_norm_eps
        x_ND = functional.embedding(step.token_ids_N, self.weights.embedding)
        turns_NF = self._turns_PF.index_select(0, step.positions_N)
        for index, (layer, attention) in enumerate(
            zip(self.weights.layers, self._attention, strict=True)
        ):
            normed = _norm(x_ND, layer.input_norm, eps)
            x_ND += attention(normed, turns_NF, step, cache.layers[index])
            normed = _norm(x_ND, layer.mlp_norm, eps)
            if isinstance(layer.mlp, MlpWeights):
                x_ND += _mlp(layer.mlp, normed)
            else:
                x_ND += self._moe(layer.mlp, normed, index, step, cache)
        return _norm(x_ND, self.weights.norm, eps)

    def _moe(self, moe: MoeWeights, x_ND: Tensor, index: int, step: Step, cache: Cache) -> Tensor:
        routed = experts.route(self.model, moe, x_ND)
        cache.record_experts(index, step, routed.experts_NK)
        return experts.mix(moe.experts, routed, x_ND) + _mlp(moe.shared, x_ND)

    def logits(self, hidden_ND: Tensor, rows: Tensor) -> Tensor:
        """Logits of some rows, in front of padding rows."""
        chosen = rows.new_zeros(padded(len(rows), ROWS))
        chosen[: len(rows)] = rows
        return linear(hidden_ND.index_select(0, chosen), self.weights.head)


def _mlp(mlp: MlpWeights, x_ND: Tensor) -> Tensor:
    return linear(experts.gated(linear(x_ND, mlp.gate_up)), mlp.down)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return functional.rms_norm(x, weight.shape, weight, eps)


def _check_widths(model: Model) -> None:
    names = ["hidden_size", "intermediate_size"]
    if network.is_dense(model):
        sizes = {"head_dim": network.head_dim(model)}
    else:
        sizes = {"q_lora_rank": model.q_lora_rank or 0}
        names += ["moe_intermediate_size", "kv_lora_rank", "v_head_dim"]
        names += ["qk_nope_head_dim", "qk_rope_head_dim"]
    sizes |= {name: getattr(model, name) for name in names}
    odd = [f"{name}={size}" for name, size in sizes.items() if size % WIDTH]
    if odd:
        raise ValueError(
            f"{', '.join(odd)}: not a multiple of {WIDTH}, so a request's bits would depend on its "
            f"batch; use sizes that are multiples of {WIDTH}"
        )
