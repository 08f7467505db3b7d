"""Weights, parts, and the difference between a wrong answer and a broken grader."""

import math
from collections.abc import Callable

import pytest

from r1mega.config.schema import Rewards
from r1mega.records import Prompt, Sample, Score
from r1mega.rewards.compose import check_errors, compose, reward_metrics, weighted_sum

Pair = tuple[Prompt, Sample]
ERROR = Score(value=0.0, parts={}, error="math: worker ended with SIGKILL")


@pytest.mark.timeout(120)
def test_value_is_weighted_and_parts_are_not(pair: Callable[[str, str], Pair]) -> None:
    reward = compose(Rewards(accuracy=2.0, format=0.5))
    scores = reward(
        [
            pair("7", "<think>3 + 4</think><answer>7</answer>"),
            pair("7", "<think>3 + 4</think><answer>14/2</answer>"),
            pair("7", "<answer>7</answer>"),
            pair("7", "<think>3 + 4</think><answer>8</answer>"),
            pair("7", "7"),
        ]
    )
    reward.close()
    assert [score.value for score in scores] == [2.5, 2.5, 2.0, 0.5, 0.0]
    assert [score.parts for score in scores] == [
        {"accuracy": 1.0, "format": 1.0},
        {"accuracy": 1.0, "format": 1.0},
        {"accuracy": 1.0, "format": 0.0},
        {"accuracy": 0.0, "format": 1.0},
        {"accuracy": 0.0, "format": 0.0},
    ]
    assert scores[4].reason == "no answer; wrong format"


def test_weight_zero_leaves_a_part_out(pair: Callable[[str, str], Pair]) -> None:
    reward = compose(Rewards(accuracy=0.0, format=1.0))
    (score,) = reward([pair("7", "<think></think><answer>8</answer>")])
    assert score == Score(value=1.0, parts={"format": 1.0})
    with pytest.raises(ValueError, match="both 0"):
        compose(Rewards(accuracy=0.0, format=0.0))


def test_an_error_in_one_part_is_an_error_of_the_score() -> None:
    score = weighted_sum([1.0, 1.0], [ERROR, Score(value=1.0, parts={"format": 1.0})])
    assert score.value == 0.0
    assert score.error == ERROR.error


def test_reward_metrics_count_errors_apart() -> None:
    def graded(accuracy: float, form: float, timed_out: bool = False) -> Score:
        parts = {"accuracy": accuracy, "format": form}
        return Score(value=accuracy + form, parts=parts, timed_out=timed_out)

    scores = [graded(1, 1), graded(0, 1), graded(0, 0, timed_out=True), graded(1, 0), ERROR]
    assert reward_metrics(scores) == {
        "reward/mean": 1.0,
        "reward/std": pytest.approx(math.sqrt(0.5)),
        "reward/accuracy": 0.5,
        "reward/format": 0.5,
        "reward/errors": 1.0,
        "reward/timeouts": 1.0,
    }
    assert reward_metrics([ERROR]) == {"reward/errors": 1.0, "reward/timeouts": 0.0}


def test_error_share_above_the_limit_ends_the_run() -> None:
    fine = Score(value=1.0, parts={"accuracy": 1.0})
    check_errors([fine] * 19 + [ERROR], 0.05)
    check_errors([], 0.05)
    with pytest.raises(RuntimeError, match=r"2 of 20 rewards failed .* allows 1.*SIGKILL"):
        check_errors([fine] * 18 + [ERROR] * 2, 0.05)
