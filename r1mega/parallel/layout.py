"""Which rank sits where on the mesh: pure arithmetic, no torch, equal to Megatron's rank generator.

The mesh is one grid, slowest axis first: pp, dp, cp, tp. Experts fold the ranks of one pipeline
stage (tp * cp * dp of them) as edp, ep, etp; so ep is not one more factor of the world.
"""

from dataclasses import dataclass
from itertools import product

from r1mega.config.derived import spread_layers

DENSE_AXES = ("tp", "cp", "dp", "pp")  # fastest first
EXPERT_AXES = ("etp", "ep", "edp", "pp")


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Sizes of all axes. ``Layout(world=8, tp=2, pp=2, ep=2)`` has dp 2, edp 2 and etp 1."""

    world: int
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    vpp: int | None = None
    layers_in_first_stage: int | None = None
    layers_in_last_stage: int | None = None

    def __post_init__(self) -> None:
        if self.world % (self.tp * self.pp * self.cp):
            raise ValueError(
                f"tp * pp * cp ({self.tp} * {self.pp} * {self.cp}) must divide the world "
                f"({self.world})"
            )
        if (self.world // self.pp) % (self.ep * self.etp):
            raise ValueError(
                f"ep * etp ({self.ep} * {self.etp}) must divide the ranks of a pipeline stage "
                f"({self.world // self.pp})"
            )

    @property
    def dp(self) -> int:
        return self.world // (self.tp * self.pp * self.cp)

    @property
    def edp(self) -> int:
        return self.world // (self.etp * self.ep * self.pp)

    def size(self, axis: str) -> int:
        return int(getattr(self, axis))

    def coordinates(self, rank: int) -> dict[str, int]:
        """Position of ``rank`` on every axis, dense and expert."""
        place: dict[str, int] = {}
        for axes in (DENSE_AXES, EXPERT_AXES):
            rest = rank
            for axis in axes:
                rest, place[axis] = divmod(rest, self.size(axis))
        return place

    def rank(self, **place: int) -> int:
        """The rank at a full set of dense coordinates (tp, cp, dp, pp) or expert ones."""
        axes = EXPERT_AXES if "edp" in place else DENSE_AXES
        rank, stride = 0, 1
        for axis in axes:
            rank += place[axis] * stride
            stride *= self.size(axis)
        return rank

    def ranks_at(self, **place: int) -> tuple[int, ...]:
        """The ranks at some coordinates of the dense or of the expert mesh, in order."""
        mesh = EXPERT_AXES if place.keys() & {"etp", "ep", "edp"} else DENSE_AXES
        spans = [(place[a], place[a] + 1) if a in place else (0, self.size(a)) for a in mesh]
        every = product(*(range(*span) for span in reversed(spans)))
        return tuple(self.rank(**dict(zip(reversed(mesh), at, strict=True))) for at in every)

    def groups(self, *axes: str) -> list[list[int]]:
        """All groups over ``axes``: ranks that differ on these axes only, in rank order."""
        mesh = EXPERT_AXES if set(axes) & {"etp", "ep", "edp"} else DENSE_AXES
        slowest_first = list(reversed(mesh))
        fixed = [axis for axis in slowest_first if axis not in axes]
        varying = [axis for axis in slowest_first if axis in axes]
        return [
            [
                self.rank(
                    **dict(zip(fixed, at, strict=True)), **dict(zip(varying, step, strict=True))
                )
                for step in product(*(range(self.size(axis)) for axis in varying))
            ]
            for at in product(*(range(self.size(axis)) for axis in fixed))
        ]

    def stage_layers(self, num_layers: int) -> list[list[range]]:
        """Global layer ids of every pipeline rank and virtual chunk: ``[pp_rank][chunk]``."""
        return stage_layers(
            num_layers, self.pp, self.vpp, self.layers_in_first_stage, self.layers_in_last_stage
        )

    def expert_peers(self, rank: int) -> list[int]:
        """The dp ranks of all that exchange tokens with ``rank``: its experts' (etp, ep) group."""
        (peers,) = [group for group in self.groups("etp", "ep") if rank in group]
        return sorted({self.coordinates(peer)["dp"] for peer in peers})

    def dp_leader(self, dp_rank: int) -> int:
        """The rank that speaks to the fleet for a data-parallel replica."""
        return self.rank(tp=0, cp=0, dp=dp_rank, pp=0)


def stage_layers(
    num_layers: int,
    pp: int,
    vpp: int | None = None,
    first: int | None = None,
    last: int | None = None,
) -> list[list[range]]:
    """Global layer ids of every pipeline rank and virtual chunk: ``layers[pp_rank][chunk]``.

    As Megatron places them: ``first`` and ``last`` layers on the outer stages when given, the rest
    evenly on the others; with vpp, the first chunks of all stages come first, then the second ones.
    """
    chunks = vpp or 1
    stages: list[list[range]] = [[] for _ in range(pp)]
    start = 0
    for _ in range(chunks):
        for stage, size in zip(stages, spread_layers(num_layers, pp, first, last), strict=True):
            stage.append(range(start, start + size // chunks))
            start += size // chunks
    return stages
