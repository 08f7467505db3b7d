"""What routers must know of a microbatch: which experts to replay, which tokens are only padding.

A sampler's rounding differs from the learner's, so near-ties are routed to other experts and the
same token gets another log-prob. Replaying the sampler's choice (R3, arXiv 2510.11370) takes that
away: a router chooses the recorded experts and weighs them by its own scores, with gradient.

Megatron hands ``packed_seq_params`` to every layer, in the forward pass and again whenever a layer
is recomputed in the backward pass, when other microbatches have run in between. So this travels
with it. (megatron-core 0.16.1's own RouterReplay keeps ids in routers, and the schedule would have
to switch them between forward and backward; of it we use the hook, ``router.router_replay``.)

Shapes: T tokens of a microbatch, S this tensor-parallel rank's shard of them, M the MoE layers of
this rank's pipeline stage, K experts per token, E experts.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.distributed import ProcessGroup

from r1mega.config import network, schema
from r1mega.parallel.layout import Layout
from r1mega.records import Routers

FREE = -1  # in place of a token's expert ids: the router chooses


@dataclass(kw_only=True)
class Packing(PackedSeqParams):
    """Megatron's description of a packed microbatch, and what routers must know of it."""

    padding_T: Tensor  # bool
    expert_ids_TMK: Tensor | None = None  # FREE where nothing was recorded; None: nothing at all
    # Of how many (token, layer) replay changed the experts: this rank's, in passes with gradient.
    rerouted: Tensor


class _TopK(Protocol):
    """Megatron's choice: scores [S, E] to values and expert ids, both [S, K]."""

    def __call__(
        self, scores: Tensor, topk: int, num_groups: int | None, group_topk: int | None
    ) -> tuple[Tensor, Tensor]: ...


class RouterGuide:
    """Tells one router about the microbatch that its layer is working on."""

    def __init__(self, layer: TransformerLayer, place: int | None, group: ProcessGroup) -> None:
        """``place`` on axis M of the recorded ids, None when the layer has none; ``group``: tp."""
        self._place = place
        self._group = group
        self._packing: Packing  # of the microbatch that is running: known once the layer is entered
        # Recomputing the experts alone begins behind the layer's door: the backward passes of a
        # chunk come in the order of its forward passes.
        self._to_recompute: deque[Packing] = deque()
        router = layer.mlp.router
        layer.register_forward_pre_hook(self._enter, with_kwargs=True)
        router.register_forward_pre_hook(self._enter_recompute)
        router.register_forward_hook(self._uncount_padding)
        router.router_replay = self

    def get_replay_topk(
        self,
        scores_SE: Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: _TopK,
    ) -> tuple[Tensor, Tensor]:
        """What megatron-core's router asks: the scores and ids of the experts to use, [S, K]."""
        values_SK, own_SK = default_compute_topk(scores_SE, topk, num_groups, group_topk)
        expert_ids_TMK = self._packing.expert_ids_TMK
        if expert_ids_TMK is None or self._place is None:
            return values_SK, own_SK
        recorded_SK = self._shard(expert_ids_TMK[:, self._place]).to(own_SK.dtype)
        used_SK = torch.where(recorded_SK == FREE, own_SK, recorded_SK)
        if torch.is_grad_enabled():  # so once per token and layer, also with recompute
            differs_SK = used_SK.sort(-1).values != own_SK.sort(-1).values
            self._packing.rerouted += differs_SK.any(-1).sum()
        return scores_SE.gather(1, used_SK), used_SK

    def _enter(self, layer: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self._packing = kwargs["packed_seq_params"]
        if layer.training and layer.mlp.moe_layer_recompute:
            self._to_recompute.append(self._packing)

    def _enter_recompute(self, router: Any, _: Any) -> None:
        if self._to_recompute and torch.is_grad_enabled():
            self._packing = self._to_recompute.popleft()

    def _uncount_padding(self, router: Any, _: Any, output: tuple[Tensor, Tensor]) -> None:
        """Take padding out of the expert load that moves expert_bias.

        megatron-core 0.16.1 accepts a padding mask, but with expert_bias it fails to broadcast.
        """
        if router.enable_expert_bias and torch.is_grad_enabled():
            routing_map_SE = output[1]
            padding_S = self._shard(self._packing.padding_T)
            router.local_tokens_per_expert -= (routing_map_SE & padding_S[:, None]).sum(dim=0)

    def _shard(self, values: Tensor) -> Tensor:
        """This rank's rows of T under sequence parallelism."""
        return values.chunk(self._group.size())[self._group.rank()]


def moe_layers(model: schema.Model, layout: Layout, pp_rank: int) -> list[int]:
    """Global ids of the layers with experts on a pipeline stage, over all its chunks: axis M."""
    chunks = layout.stage_layers(model.num_hidden_layers)[pp_rank]
    dense = network.num_dense_layers(model)
    return [layer for chunk in chunks for layer in chunk if layer >= dense]


def routers(model: schema.Model) -> Routers:
    """The form of recorded ids that ``model`` wants."""
    return Routers(
        num_layers=model.num_hidden_layers,
        num_dense_layers=network.num_dense_layers(model),
        topk=model.num_experts_per_tok,
        num_experts=model.n_routed_experts,
    )


def guide_routers(policy: GPTModel, layers: Sequence[int], group: ProcessGroup) -> None:
    """Attach a guide to every router of a chunk; ``layers`` are the stage's ``moe_layers``."""
    decoder = set(policy.decoder.layers)
    for layer in policy.modules():
        if isinstance(layer, TransformerLayer) and layer.is_moe_layer:
            # MTP layers have routers too, of which nothing is recorded.
            place = layers.index(layer.layer_number - 1) if layer in decoder else None
            RouterGuide(layer, place, group)
