"""The reshard plan: which learner rank sends which rectangle of which tensor to which engine rank.

Every byte of every engine rank comes from the learner exactly once. Pure Python: no torch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from r1mega.config import schema
from r1mega.parallel.layout import Layout
from r1mega.weights.engine_names import EngineLayout
from r1mega.weights.names import Region, Spec


@dataclass(frozen=True, slots=True)
class Transfer:
    """``hf_name[region]``, from a learner rank to rank ``rank`` of engine number ``engine``.

    FP8 scales are tensors of their own (``..._scale_inv``): their transfer follows in the same
    order, from the rank that sends the codes.
    """

    hf_name: str
    region: Region
    source: int
    engine: int
    rank: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    learner: Layout
    engines: tuple[EngineLayout, ...]
    bytes: int
    minimum_bytes: int
    sent_bytes: tuple[int, ...]  # of each learner rank

    def sends(self, rank: int) -> Iterator[Transfer]:
        """What learner ``rank`` sends, in the order of the plan."""
        raise NotImplementedError

    def receives(self, engine: int, rank: int) -> Iterator[Transfer]:
        """What ``rank`` of an engine receives, in the order of the plan."""
        raise NotImplementedError


def plan(
    model: schema.Model,
    learner: Layout,
    engines: Sequence[EngineLayout],
    *,
    spec: Spec = Spec(),
    itemsize: int = 2,
) -> Plan:
    """``itemsize``: of the engines' weights that are neither FP8 nor always fp32."""
    raise NotImplementedError


def prove(plan: Plan) -> None:
    """Raises ValueError unless every engine byte is written exactly once, by a rank that has it."""
    raise NotImplementedError
