"""What k responses per prompt say about a policy: pass@1, pass@k and cons@k. Pure arithmetic.

Shapes: P prompts, K responses of each. ``correct_PK`` holds 1 or 0 (True or False).
"""

from collections.abc import Callable, Sequence
from math import comb
from operator import eq
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
    answers_PK: Sequence[Sequence[str | None]],
    correct_PK: Sequence[Sequence[float]],
    equivalent: Callable[[str, str], bool] = eq,
) -> float:
    """Share of prompts whose most frequent answer is right (self-consistency, majority vote).

    Responses without an answer (None) do not vote. Right answers are one class, for all equal the
    gold one; a wrong answer joins the first class whose first member it is equivalent to. Of
    classes with equal votes the one seen first wins.
    """
    return fmean(
        _majority_is_right(answers_K, correct_K, equivalent)
        for answers_K, correct_K in zip(answers_PK, correct_PK, strict=True)
    )


def _majority_is_right(
    answers_K: Sequence[str | None],
    correct_K: Sequence[float],
    equivalent: Callable[[str, str], bool],
) -> bool:
    classes: list[tuple[str, bool, list[str]]] = []  # first member, right or wrong, members
    for answer, correct in zip(answers_K, correct_K, strict=True):
        if answer is None:
            continue
        right = bool(correct)
        for first, class_right, members in classes:
            if class_right == right and (right or equivalent(first, answer)):
                members.append(answer)
                break
        else:
            classes.append((answer, right, [answer]))
    # max() keeps the first of equals, and classes are in order of appearance
    return bool(classes) and max(classes, key=lambda entry: len(entry[2]))[1]
