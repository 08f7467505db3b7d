"""Sums and differences of digits, and the text a base model learns from.

A problem is ``2+5-3``: between 3 and ``difficulty`` distinct digits whose running totals are digits
too. A base model's corpus holds worked calculations and conversations, and the conversations show
several ways to respond; reinforcement learning finds out which of them is worth its tokens:

    worked    2+5-3=7-3=4                                        a calculation on its own
    direct    <think>6</think><answer>6</answer>                 at once, mostly wrong
    reasoned  <think>2+5-3=7-3=4</think><answer>4</answer>       step by step, mostly right
    plain     4                                                  without the format

Each step adds up the first two terms and copies the rest. Which term comes next is seen from the
one before, as digits do not repeat: a model of 0.3M parameters learns that from 2M tokens, but not
to add up in its head. A problem is held out by a hash of its text, so that no seed and no stage
ever trains on it.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

from r1mega.data.template import Template, render

MAX_TOTAL = 9
HELD_OUT_SHARE = 1 / 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """What a corpus holds: the share of conversations, how they respond, how often rightly.

    The shares of reasoned and plain responses are of the conversations; the others are direct.
    """

    conversations: float = 0.5
    reasoned: float = 0.22
    plain: float = 0.05
    direct_right: float = 0.1
    step_right: float = 0.995


@dataclass(frozen=True, slots=True)
class Problem:
    """``Problem((2, 5, -3))`` is ``2+5-3``: signed terms, the first one positive."""

    terms: tuple[int, ...]

    @property
    def question(self) -> str:
        return expression(self.terms)

    @property
    def answer(self) -> int:
        return sum(self.terms)

    @property
    def is_held_out(self) -> bool:
        digest = hashlib.sha256(self.question.encode()).digest()
        return digest[0] < 256 * HELD_OUT_SHARE


def expression(terms: tuple[int, ...]) -> str:
    """``expression((2, 5, -3)) == "2+5-3"``"""
    return str(terms[0]) + "".join(f"{term:+d}" for term in terms[1:])


def problems(seed: int, count: int, difficulty: int, *, held_out: bool) -> list[Problem]:
    """``count`` problems of the training or of the held-out part; a training problem may recur."""
    if not 3 <= difficulty <= 9:
        raise ValueError(
            f"data.difficulty is {difficulty}: choose 3 to 9, the most terms of a problem"
        )
    rng = random.Random(f"problems {seed} {held_out}")
    found: list[Problem] = []
    while len(found) < count:
        problem = _draw(rng, rng.randint(3, difficulty))
        if problem.is_held_out == held_out:
            found.append(problem)
    return found


def documents(
    seed: int, count: int, difficulty: int, template: Template, mixture: Mixture
) -> Iterator[tuple[str, str]]:
    """(rendered prompt, response) over training problems; a worked calculation has no prompt."""
    rng = random.Random(f"documents {seed}")
    for problem in problems(seed, count, difficulty, held_out=False):
        if rng.random() < mixture.conversations:
            yield render(template, problem.question), respond(problem, mixture, rng)
        else:
            yield "", work_out(problem, mixture.step_right, rng)[0]


def respond(problem: Problem, mixture: Mixture, rng: random.Random) -> str:
    """One response, of a kind and with mistakes drawn as the mixture says."""
    kind = rng.random()
    if kind < mixture.reasoned:
        thought, answer = work_out(problem, mixture.step_right, rng)
        return f"<think>{thought}</think><answer>{answer}</answer>"
    answer = problem.answer
    if rng.random() >= mixture.direct_right:
        answer = _misjudge(answer, rng)
    if kind < mixture.reasoned + mixture.plain:
        return str(answer)
    return f"<think>{answer}</think><answer>{answer}</answer>"


def work_out(problem: Problem, step_right: float, rng: random.Random) -> tuple[str, int]:
    """The calculation and its result; a wrong step carries on from its wrong total."""
    terms = problem.terms
    expressions = [problem.question]
    while len(terms) > 1:
        total = min(max(terms[0] + terms[1], 0), MAX_TOTAL)
        if rng.random() >= step_right:
            total = _misjudge(total, rng)
        terms = (total, *terms[2:])
        expressions.append(expression(terms))
    return "=".join(expressions), terms[0]


def _draw(rng: random.Random, num_terms: int) -> Problem:
    """Distinct digits, signed such that every running total is a digit; drawn until that works."""
    while True:
        terms: list[int] = []
        for digit in rng.sample(range(1, 10), num_terms):
            signed = [term for term in (digit, -digit) if 0 <= sum(terms) + term <= MAX_TOTAL]
            if not signed:
                break
            terms.append(rng.choice(signed))
        else:
            return Problem(tuple(terms))


def _misjudge(total: int, rng: random.Random) -> int:
    """A wrong total, another digit."""
    return rng.choice([value for value in range(MAX_TOTAL + 1) if value != total])
