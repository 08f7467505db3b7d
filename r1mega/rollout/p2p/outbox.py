"""What one learner rank sends: the transfers of a reshard plan, and its live weights for them."""

from torch import Tensor

from r1mega.rollout.p2p.messages import Piece
from r1mega.rollout.p2p.sender import Outgoing
from r1mega.weights.blocks import BLOCK, weight_name
from r1mega.weights.engine_names import CODES
from r1mega.weights.fp8 import quantize
from r1mega.weights.local import LocalWeights, wire_dtype
from r1mega.weights.names import ParameterSlice
from r1mega.weights.regions import Region, indices
from r1mega.weights.reshard import Transfer


class Outbox:
    """The live weights of this rank, as transfers want them."""

    def __init__(self, weights: LocalWeights) -> None:
        self._weights = weights
        self._slices: dict[str, list[ParameterSlice]] = {}
        for held in weights.slices:
            self._slices.setdefault(held.hf_name, []).append(held)

    def item(self, transfer: Transfer) -> Outgoing:
        name = transfer.hf_name
        dtype = transfer.dtype or str(wire_dtype(name, self._weights)).removeprefix("torch.")
        piece = Piece(transfer.parameter, transfer.target, dtype)
        return Outgoing(name, transfer.region, piece)

    def read(self, item: Outgoing) -> Tensor:
        """The values of ``item``; FP8 codes and scales are made here, of whole blocks."""
        if (weight := weight_name(item.name)) is not None:
            shape = self._slices[weight][0].hf_shape
            scaled = tuple(
                (start * BLOCK, min(stop * BLOCK, size))
                for (start, stop), size in zip(item.region, shape, strict=True)
            )
            return quantize(self._values(weight, scaled))[1]
        values = self._values(item.name, item.region)
        return quantize(values)[0] if item.piece.dtype == CODES else values

    def _values(self, name: str, region: Region) -> Tensor:
        held = next(s for s in self._slices[name] if _contains(s.region, region))
        return self._weights.region(held)[indices(region, held.region)]


def _contains(outer: Region, inner: Region) -> bool:
    return all(a <= b and d <= c for (a, c), (b, d) in zip(outer, inner, strict=True))
