"""Which tokens of a microbatch are predicted, and by which."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """Row l predicts ``ids_L[l]`` from the token at ``rows_L[l]`` of this context-parallel rank.

    It is number ``places_L[l]`` of the microbatch's ``num_rows`` target rows R (all targets of all
    sequences, in order). L of them have their token on this rank: all of R without cp.
    """

    rows_L: Tensor
    ids_L: Tensor
    places_L: Tensor
    num_rows: int
