"""Generated problems and responses: right, disjoint, reproducible, mixed as asked."""

import random
from itertools import pairwise

import pytest

from r1mega.data.arithmetic import Mixture, Problem, documents, problems, respond

ALWAYS_REASONED = Mixture(reasoned=1.0, plain=0.0, step_right=1.0)


def test_a_problem_by_hand() -> None:
    problem = Problem((7, 5, -3))
    assert problem.question == "7+5-3"
    assert problem.answer == 9
    assert (
        respond(problem, ALWAYS_REASONED, random.Random(0))
        == "<think>7+5=12\n12-3=9</think><answer>9</answer>"
    )


def test_problems_have_distinct_digits_and_small_totals() -> None:
    for problem in problems(3, 500, 6, held_out=False):
        digits = [abs(term) for term in problem.terms]
        totals = [sum(problem.terms[:count]) for count in range(1, len(digits) + 1)]
        assert 3 <= len(digits) <= 6
        assert len(set(digits)) == len(digits)
        assert 0 <= min(totals) <= max(totals) <= 99


def test_problems_repeat_by_seed_and_differ_between_seeds() -> None:
    assert problems(1, 50, 5, held_out=False) == problems(1, 50, 5, held_out=False)
    assert problems(1, 50, 5, held_out=False) != problems(2, 50, 5, held_out=False)
    assert problems(1, 50, 5, held_out=False) == problems(1, 80, 5, held_out=False)[:50]


def test_held_out_problems_are_in_no_seeds_training_part() -> None:
    held_out = {problem.question for problem in problems(1, 400, 4, held_out=True)}
    for seed in range(3):
        assert held_out.isdisjoint(p.question for p in problems(seed, 3000, 4, held_out=False))


def test_reasoned_steps_are_true_when_steps_are_always_right() -> None:
    for problem in problems(5, 100, 6, held_out=False):
        response = respond(problem, ALWAYS_REASONED, random.Random(0))
        lines = response.removeprefix("<think>").split("</think>")[0].split("\n")
        totals = [int(line.split("=")[1]) for line in lines]
        assert totals == [sum(problem.terms[:n]) for n in range(2, len(problem.terms) + 1)]
        assert response.endswith(f"<answer>{problem.answer}</answer>")
        for before, line in pairwise(["=" + str(problem.terms[0]), *lines]):
            assert line.startswith(before.split("=")[1])


def test_corpus_has_the_kinds_and_the_mistakes_of_its_mixture() -> None:
    mixture = Mixture(reasoned=0.3, plain=0.1, direct_right=0.2, step_right=0.9)
    count = 4000
    pairs = list(documents(7, count, 5, "brief", mixture))
    reasoned = [response for _, response in pairs if "=" in response]
    plain = [response for _, response in pairs if "<answer>" not in response]
    assert abs(len(reasoned) / count - 0.3) < 0.03
    assert abs(len(plain) / count - 0.1) < 0.02
    asked = problems(7, count, 5, held_out=False)
    direct_right = [
        f"<answer>{problem.answer}</answer>" in response
        for problem, (_, response) in zip(asked, pairs, strict=True)
        if "=" not in response and "<answer>" in response
    ]
    assert abs(sum(direct_right) / len(direct_right) - 0.2) < 0.03


@pytest.mark.parametrize("difficulty", [2, 10])
def test_difficulty_out_of_range_is_refused(difficulty: int) -> None:
    with pytest.raises(ValueError, match=f"data.difficulty is {difficulty}: choose 3 to 9"):
        problems(1, 1, difficulty, held_out=False)
