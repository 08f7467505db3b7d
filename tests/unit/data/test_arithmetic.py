"""Generated problems and responses: right, disjoint, reproducible, mixed as asked."""

import random
from collections.abc import Iterable

import pytest

from r1mega.data.arithmetic import Mixture, Problem, documents, problems, respond, work_out


def test_a_problem_by_hand() -> None:
    problem = Problem((2, 5, -3))
    assert problem.question == "2+5-3"
    assert problem.answer == 4
    assert work_out(problem, 1.0, random.Random(0)) == ("2+5-3=7-3=4", 4)


@pytest.mark.parametrize(
    ("mixture", "response"),
    [
        (Mixture(reasoned=1.0, step_right=1.0), "<think>2+5-3=7-3=4</think><answer>4</answer>"),
        (Mixture(reasoned=0.0, plain=0.0, direct_right=1.0), "<think>4</think><answer>4</answer>"),
        (Mixture(reasoned=0.0, plain=1.0, direct_right=1.0), "4"),
    ],
)
def test_responses_by_hand(mixture: Mixture, response: str) -> None:
    assert respond(Problem((2, 5, -3)), mixture, random.Random(0)) == response


def test_a_wrong_step_carries_on_from_its_wrong_total() -> None:
    text, answer = work_out(Problem((2, 5, -3)), 0.0, random.Random(0))
    whole, reduced, result = text.split("=")
    assert whole == "2+5-3"
    assert reduced.endswith("-3")
    assert reduced != "7-3"
    assert int(result) == answer != int(reduced[0]) - 3


def test_problems_have_distinct_digits_and_totals_that_are_digits() -> None:
    for difficulty in (3, 6, 9):
        for problem in problems(3, 300, difficulty, held_out=False):
            digits = [abs(term) for term in problem.terms]
            totals = [sum(problem.terms[:count]) for count in range(1, len(digits) + 1)]
            assert 3 <= len(digits) <= difficulty
            assert len(set(digits)) == len(digits)
            assert 0 <= min(totals) <= max(totals) <= 9


def test_problems_repeat_by_seed_and_differ_between_seeds() -> None:
    assert problems(1, 50, 5, held_out=False) == problems(1, 50, 5, held_out=False)
    assert problems(1, 50, 5, held_out=False) != problems(2, 50, 5, held_out=False)
    assert problems(1, 50, 5, held_out=False) == problems(1, 80, 5, held_out=False)[:50]


def test_held_out_problems_are_in_no_seeds_training_part() -> None:
    held_out = {problem.question for problem in problems(1, 400, 4, held_out=True)}
    for seed in range(3):
        assert held_out.isdisjoint(p.question for p in problems(seed, 3000, 4, held_out=False))


def test_every_expression_of_a_right_calculation_has_the_same_value() -> None:
    for problem in problems(5, 100, 6, held_out=False):
        text, answer = work_out(problem, 1.0, random.Random(0))
        expressions = text.split("=")
        assert len(expressions) == len(problem.terms)
        assert {eval(expression) for expression in expressions} == {answer} == {problem.answer}


def test_corpus_has_the_kinds_and_the_mistakes_of_its_mixture() -> None:
    mixture = Mixture(conversations=0.6, reasoned=0.3, plain=0.1, direct_right=0.2, step_right=0.9)
    count = 8000
    pairs = list(documents(7, count, 5, "brief", mixture))
    asked = problems(7, count, 5, held_out=False)
    conversations = [
        (problem, response)
        for problem, (prompt, response) in zip(asked, pairs, strict=True)
        if prompt
    ]
    responses = [response for _, response in conversations]
    assert share(prompt != "" for prompt, _ in pairs) == pytest.approx(0.6, abs=0.02)
    assert share("=" in response for response in responses) == pytest.approx(0.3, abs=0.02)
    assert share("<" not in response for response in responses) == pytest.approx(0.1, abs=0.02)
    assert share(
        f"<answer>{problem.answer}</answer>" in response
        for problem, response in conversations
        if "=" not in response and "<" in response
    ) == pytest.approx(0.2, abs=0.03)
    assert all(
        prompt == f"User: {p.question} Assistant:" or not prompt
        for p, (prompt, _) in zip(asked, pairs, strict=True)
    )


def share(truths: Iterable[bool]) -> float:
    values = list(truths)
    return sum(values) / len(values)


@pytest.mark.parametrize("difficulty", [2, 10])
def test_difficulty_out_of_range_is_refused(difficulty: int) -> None:
    with pytest.raises(ValueError, match=f"data.difficulty is {difficulty}: choose 3 to 9"):
        problems(1, 1, difficulty, held_out=False)
