"""What k responses per prompt say about a policy: pass@1, pass@k and cons@k. Pure arithmetic.

Shapes: P prompts, K responses of each. ``correct_PK`` holds 1 or 0 (True or False).
"""

from collections import Counter
from collections.abc import Sequence
from math import comb
from operator import itemgetter
from statistics import fmean


def pass_at_1(correct_PK: Sequence[Sequence[float]]) -> float:
    """Mean over prompts of the mean over responses: R1's pass@1 = (1/k) sum_i p_i."""
    return fmean(fmean(correct_K) for correct_K in correct_PK)


def pass_at_k(correct_PK: Sequence[Sequence[float]], k: int) -> float:
    """Unbiased chance that one of k responses is right: 1 - C(n-c, k) / C(n, k) (Chen et al. 2021,
    arXiv 2107.03374, eq. 1), n responses of which c are right; mean over prompts."""
    fewest = min(len(correct_K) for correct_K in correct_PK)
    if not 1 <= k <= fewest:
        raise ValueError(f"pass@{k} needs at least {k} responses per prompt (and k >= 1): {fewest}")
    return fmean(
        1.0 - comb(len(correct_K) - sum(map(bool, correct_K)), k) / comb(len(correct_K), k)
        for correct_K in correct_PK
    )


def cons_at_k(
    answers_PK: Sequence[Sequence[str | None]], correct_PK: Sequence[Sequence[float]]
) -> float:
    """Share of prompts whose most frequent answer is right (self-consistency, majority vote).

    Responses without an answer (None) do not vote. Right answers are one class, for all equal the
    gold one; wrong ones are classes of equal texts. Of classes with equal votes the one seen first
    wins.
    """
    return fmean(map(_majority_is_right, answers_PK, correct_PK))


def _majority_is_right(answers_K: Sequence[str | None], correct_K: Sequence[float]) -> bool:
    votes = Counter(
        (bool(correct), "" if correct else answer)
        for answer, correct in zip(answers_K, correct_K, strict=True)
        if answer is not None
    )
    if not votes:
        return False
    (right, _), _ = max(votes.items(), key=itemgetter(1))  # of equals the first seen
    return right
