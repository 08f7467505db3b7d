"""Which rank stores which part of every tensor of a checkpoint.

Every distinct rectangle is stored once; where several ranks hold it, they share the work evenly.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from r1mega.weights.checkpoints.checkpoint import shard
from r1mega.weights.checkpoints.host_file import Part
from r1mega.weights.holders import balanced_owners
from r1mega.weights.local import LocalWeights, wire_dtype
from r1mega.weights.names import ParameterSlice
from r1mega.weights.regions import Region, extent, volume
from r1mega.weights.slices import Piece, StoredTensor, checkpoint_index
from r1mega.weights.tensor_file import DTYPE_NAMES


@dataclass(frozen=True, slots=True)
class Share:
    """A part of a tensor, and who stores it."""

    hf_name: str
    hf_shape: tuple[int, ...]
    dtype: str  # safetensors' name
    region: Region
    owner: int


@dataclass(frozen=True, slots=True)
class Shares:
    """Of all tensors, in forward order; ``mine`` are this rank's slices among them."""

    every: tuple[Share, ...]
    mine: tuple[ParameterSlice, ...]

    @classmethod
    def of(cls, weights: LocalWeights) -> "Shares":
        dtypes = {name: wire_dtype(name, weights) for name in weights.holders}

        def num_bytes(name: str, region: Region) -> int:
            return volume(region) * dtypes[name].itemsize

        owners = balanced_owners(weights.holders, num_bytes)
        every = [
            Share(name, held.shape, DTYPE_NAMES[dtypes[name]], region, owner)
            for name, held in weights.holders.items()
            for (region, _), owner in zip(held.parts, owners[name], strict=True)
        ]
        slices = {(piece.hf_name, piece.region): piece for piece in weights.slices}
        mine = [slices[s.hf_name, s.region] for s in every if s.owner == weights.rank]
        return cls(tuple(every), tuple(mine))

    def part(self, weights: LocalWeights) -> Part:
        """What this rank stores."""
        tensors = {piece.hf_name: weights.blocks(piece) for piece in self.mine}
        return Part(
            tensors,
            {
                piece.hf_name: (
                    DTYPE_NAMES[tensors[piece.hf_name].dtype],
                    tuple(extent(piece.region)),
                )
                for piece in self.mine
            },
        )

    def index(self, digests: Sequence[Sequence[str]]) -> str:
        """The content of index.json, given the digests of every rank's part."""
        left = [iter(of_rank) for of_rank in digests]
        found: dict[str, tuple[Share, list[Piece]]] = {}
        for share in self.every:
            file, digest = shard("weights", share.owner), next(left[share.owner])
            piece = Piece(file, share.hf_name, share.region, digest)
            found.setdefault(share.hf_name, (share, []))[1].append(piece)
        return checkpoint_index(
            {
                name: StoredTensor(share.hf_shape, tuple(pieces), share.dtype)
                for name, (share, pieces) in found.items()
            }
        )
