"""Whole Hugging Face tensors on rank 0, put together from the ranks that hold their rectangles.

Each distinct rectangle crosses the network once. Several tensors are on their way at any time, so
that rank 0 waits for bytes and not for the latency of every rectangle.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from r1mega.weights.local import LocalWeights, wire_dtype
from r1mega.weights.regions import Region, extent, indices

_ON_THE_WAY_BYTES = 256 << 20


@dataclass(slots=True)
class _Transit:
    """A tensor on its way, as one rank sees it."""

    name: str
    whole: Tensor | None = None  # on rank 0
    num_bytes: int = 0  # that this rank holds for it
    works: "list[dist.Work]" = field(default_factory=list)
    blocks: list[tuple[Region, Tensor]] = field(default_factory=list)  # kept until it has arrived

    def arrive(self) -> tuple[str, Tensor | None]:
        for work in self.works:
            work.wait()
        if (whole := self.whole) is not None:
            for region, block in self.blocks:
                whole[indices(region)] = block
        return self.name, self.whole


def hf_tensors(
    weights: LocalWeights, names: Iterable[str], *, device: torch.device
) -> Iterator[tuple[str, Tensor | None]]:
    """Stream whole tensors to rank 0, in order; all ranks iterate to the end.

    ``names`` are some or all of ``weights.holders``. Yields (name, a copy) on rank 0 and (name,
    None) elsewhere. A rectangle comes from the lowest rank that holds it.
    """
    weights.settle()
    own = {(piece.hf_name, piece.region): piece for piece in weights.slices}

    def depart(name: str) -> _Transit:
        parts = weights.holders[name].parts
        mine = {
            region: weights.region(own[name, region])
            for region, (owner, *_) in parts
            if owner == weights.rank
        }
        if weights.rank != 0:
            return _send(name, mine)
        whole = torch.empty(
            weights.holders[name].shape, dtype=wire_dtype(name, weights), device=device
        )
        others = [(region, owner) for region, (owner, *_) in parts if owner != 0]
        return _receive(name, whole, mine, others)

    on_the_way: deque[_Transit] = deque()
    num_bytes = 0
    for name in names:
        on_the_way.append(depart(name))
        num_bytes += on_the_way[-1].num_bytes
        while num_bytes > _ON_THE_WAY_BYTES:
            num_bytes -= on_the_way[0].num_bytes
            yield on_the_way.popleft().arrive()
    while on_the_way:
        yield on_the_way.popleft().arrive()


def _send(name: str, mine: dict[Region, Tensor]) -> _Transit:
    transit = _Transit(name)
    for region, values in mine.items():
        block = values.contiguous()
        transit.blocks.append((region, block))
        transit.works.append(_work(dist.isend(block, dst=0)))
        transit.num_bytes += block.nbytes
    return transit


def _receive(
    name: str, whole: Tensor, mine: dict[Region, Tensor], others: list[tuple[Region, int]]
) -> _Transit:
    transit = _Transit(name, whole, whole.nbytes, blocks=list(mine.items()))
    for region, owner in others:
        place = whole[indices(region)]
        if not place.is_contiguous():
            place = whole.new_empty(extent(region))
            transit.blocks.append((region, place))
        transit.works.append(_work(dist.irecv(place, src=owner)))
    return transit


def _work(posted: "dist.Work | None") -> "dist.Work":
    if posted is None:
        raise RuntimeError("this rank is not part of the learner's process group")
    return posted
