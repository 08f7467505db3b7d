"""pass@1, pass@k and cons@k against numbers computed by hand and by enumeration."""

from itertools import combinations

import pytest

from r1mega.run.evaluation import cons_at_k, pass_at_1, pass_at_k


def test_pass_at_1_is_a_mean_of_means() -> None:
    # 3/4, 0 and 1/2: prompts weigh the same whatever their number of responses
    assert pass_at_1([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0]]) == pytest.approx((0.75 + 0 + 0.5) / 3)


def test_pass_at_k_by_hand() -> None:
    # n=4, c=2: 1 - C(2,2)/C(4,2) = 1 - 1/6; n=4, c=3: no two wrong ones, 1; n=4, c=0: 0
    assert pass_at_k([[1, 0, 1, 0]], 2) == pytest.approx(5 / 6)
    assert pass_at_k([[1, 0, 1, 1]], 2) == 1.0
    assert pass_at_k([[0, 0, 0, 0]], 2) == 0.0
    rows = [[1, 0, 1, 0], [1, 0, 1, 1], [0, 0, 0, 0]]
    assert pass_at_k(rows, 2) == pytest.approx((5 / 6 + 1 + 0) / 3)


@pytest.mark.parametrize("right", range(7))
@pytest.mark.parametrize("k", range(1, 7))
def test_pass_at_k_is_the_share_of_lucky_subsets(right: int, k: int) -> None:
    correct = [1.0] * right + [0.0] * (6 - right)
    subsets = list(combinations(correct, k))
    assert pass_at_k([correct], k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_1_is_pass_at_k_of_one_and_large_n_stays_exact() -> None:
    rows = [[1, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
    assert pass_at_k(rows, 1) == pytest.approx(pass_at_1(rows))
    assert pass_at_k([[1] + [0] * 9999], 5000) == pytest.approx(0.5)


@pytest.mark.parametrize("k", [0, 3])
def test_pass_at_k_needs_k_responses(k: int) -> None:
    with pytest.raises(ValueError, match=f"pass@{k} needs at least {k} responses"):
        pass_at_k([[1, 0], [1, 0, 1]], k)


@pytest.mark.parametrize(
    ("answers", "correct", "expected"),
    [
        (["7", "7", "8"], [1, 1, 0], 1.0),
        (["8", "8", "7"], [0, 0, 1], 0.0),
        (["7", "8"], [1, 0], 1.0),  # a tie goes to the answer seen first
        (["8", "7"], [0, 1], 0.0),
        (["8", "7", "7", "8", "7"], [0, 1, 1, 0, 1], 1.0),
        ([None, None, "7"], [0, 0, 1], 1.0),  # no answer, no vote
        ([None, None], [0, 0], 0.0),
        (["8", "8", "1/2", "0.5", "2/4"], [0, 0, 1, 1, 1], 1.0),  # right answers are one class
        (["8", "9", "10", "7", "7"], [0, 0, 0, 1, 1], 1.0),
    ],
)
def test_cons_at_k(answers: list[str | None], correct: list[float], expected: float) -> None:
    assert cons_at_k([answers], [correct]) == expected


def test_cons_at_k_is_a_share_of_prompts() -> None:
    # 1 : 1 : 1, the first wins; texts that differ are different wrong answers
    assert cons_at_k([["7", "8", "8.0"], ["8", "8"]], [[1, 0, 0], [0, 0]]) == 0.5
