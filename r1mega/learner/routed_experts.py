"""From the ranks that drew a batch's samples to those that train them: recorded expert ids.

Every rank knows the whole batch but its expert ids, which outweigh the rest a hundred times: those
of a sequence are where it was drawn. Once the batch is packed, the ids of a microbatch go to the
ranks that run it, and each gets the layers of its own pipeline stage only.
Shapes: N tokens of a sequence but the last, M the MoE layers of a pipeline stage, K experts each.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from r1mega.config import schema
from r1mega.learner.microbatch import Microbatch
from r1mega.learner.packing import Partition
from r1mega.model.routing import moe_layers, routers
from r1mega.parallel.collectives import exchange_bytes
from r1mega.parallel.groups import Groups
from r1mega.records import Batch, Routers, Sequence


def fetch_expert_ids(
    batch: Batch,
    partition: Partition,
    *,
    model: schema.Model,
    groups: Groups,
    device: torch.device,
) -> Iterator[list[Tensor] | None]:
    """Per microbatch of this rank, and per sequence in it: ids [N, M, K] on the host. Collective.

    None for each microbatch when the batch replays nothing.
    One exchange per microbatch, so that a sender never copies more than what these need. Raises
    ValueError on every rank when no rank has the ids of a sequence.
    """
    if not batch.replays_routing:
        yield from repeat(None, len(partition.parts[0]))
        return
    form, layout = routers(model), groups.layout
    stages = [moe_layers(model, layout, pp_rank) for pp_rank in range(layout.pp)]
    exchange = _Exchange(
        sequences=batch.sequences,
        owners=_owners(batch, groups, device),
        routers=form,
        stages=[[layer - form.num_dense_layers for layer in layers] for layers in stages],
        groups=groups,
        device=device,
    )
    for wanted in zip(*partition.parts, strict=True):
        yield exchange(wanted)


def rerouted_share(
    batch: Batch, microbatches: list[Microbatch], model: schema.Model
) -> dict[str, float]:
    """This rank's part in the share of (token, layer) whose experts replay changed."""
    if not batch.replays_routing:
        return {}
    changed = sum(int(microbatch.packed.rerouted) for microbatch in microbatches)
    num_tokens = sum(len(s.token_ids) - 1 for s in batch.sequences)
    return {"mismatch/routing": changed / max(1, num_tokens * routers(model).num_moe_layers)}


def _owners(batch: Batch, groups: Groups, device: torch.device) -> list[int]:
    """Of every sequence a rank that has its ids."""
    held = [-1 if s.routed_experts is None else groups.rank for s in batch.sequences]
    table = torch.tensor(held, dtype=torch.int64, device=device)
    dist.all_reduce(table, op=dist.ReduceOp.MAX, group=groups.world)
    owners: list[int] = table.tolist()
    for sequence, owner in zip(batch.sequences, owners, strict=True):
        if owner < 0:
            raise ValueError(
                f"{sequence.uid} comes without the experts it was routed to, which "
                "algorithm.replay_routing wants: draw it with replay_routing on, or turn it off"
            )
    return owners


@dataclass(frozen=True, kw_only=True, slots=True)
class _Exchange:
    """Brings the ids of one microbatch, on all ranks at once."""

    sequences: tuple[Sequence, ...]
    owners: list[int]
    routers: Routers
    stages: list[list[int]]  # positions among all MoE layers, by pipeline rank
    groups: Groups
    device: torch.device

    def __call__(self, wanted: tuple[list[int], ...]) -> list[Tensor]:
        """``wanted[dp_rank]``: which sequences; returns those of this rank, in order."""
        layout, place = self.groups.layout, self.groups.place
        peers = range(layout.world)
        parcels = {
            (dp_rank, pp_rank): self._parcel(indices, layers)
            for dp_rank, indices in enumerate(wanted)
            for pp_rank, layers in enumerate(self.stages)
        }
        mine, layers = wanted[place["dp"]], self.stages[place["pp"]]
        shapes = {i: (self._num_tokens(i), len(layers), self.routers.topk) for i in mine}
        item = np.dtype(self.routers.id_dtype).itemsize
        sources = [[i for i in mine if self.owners[i] == peer] for peer in peers]
        sizes = [[int(np.prod(shapes[i])) * item for i in source] for source in sources]
        at = [layout.coordinates(peer) for peer in peers]
        received = exchange_bytes(
            [parcels[place["dp"], place["pp"]] for place in at],
            [sum(part) for part in sizes],
            group=self.groups.world,
            device=self.device,
        )
        ids = {
            i: piece.view(getattr(torch, self.routers.id_dtype)).view(shapes[i])
            for source, parcel, split in zip(sources, received, sizes, strict=True)
            for i, piece in zip(source, parcel.split(split), strict=True)
        }
        return [ids[i] for i in mine]

    def _parcel(self, indices: list[int], layers: list[int]) -> bytes:
        """What this rank has of ``indices``."""
        owned = [i for i in indices if self.owners[i] == self.groups.rank]
        return b"".join(self._ids(i)[:, layers].tobytes() for i in owned)

    def _ids(self, index: int) -> NDArray[np.generic]:
        """All layers' ids of a sequence that this rank has."""
        sequence, form = self.sequences[index], self.routers
        recorded = sequence.routed_experts
        assert recorded is not None
        shape = (self._num_tokens(index), form.num_moe_layers, form.topk)
        found = np.frombuffer(recorded.ids, recorded.dtype)
        if (recorded.dtype, found.size) != (form.id_dtype, np.prod(shape)):
            raise ValueError(
                f"{sequence.uid} comes with {found.size} expert ids of {recorded.dtype}, but the "
                f"model routes {shape} (tokens - 1, layers, topk) in {form.id_dtype}: it was drawn "
                "from another model"
            )
        return found.reshape(shape)

    def _num_tokens(self, index: int) -> int:
        return len(self.sequences[index].token_ids) - 1
