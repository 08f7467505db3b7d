"""Proof of a reshard plan: every byte of every engine rank is written exactly once, by a rank that
has it.

What each rank holds is taken from the tables rank by rank, not from what the plan was computed with,
and coverage is shown by volume and disjointness, not by intersection.
"""

from r1mega.weights.reshard import Plan


def prove(plan: Plan) -> None:
    """Raises ValueError naming the first tensor, engine and rank that the plan gets wrong."""
    raise NotImplementedError
