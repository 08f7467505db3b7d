"""Sums and differences of a few digits, and the text a base model learns from.

A problem is ``7+5-3``: between 3 and ``difficulty`` distinct digits, every running total in 0..99.
A base model's corpus shows several ways to respond to it; reinforcement learning finds out which of
them is worth its tokens:

    direct    <think>9</think><answer>9</answer>                      at once, mostly wrong
    reasoned  <think>7+5=12\\n12-3=9</think><answer>9</answer>          step by step, mostly right
    plain     9                                                       without the format

A problem is held out by a hash of its text, so that no seed and no stage ever trains on it.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

from r1mega.data.template import Template, render

MAX_TOTAL = 99
HELD_OUT_SHARE = 1 / 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """How a corpus responds: shares of the kinds of response, and how often each is right."""

    reasoned: float = 0.25
    plain: float = 0.05
    direct_right: float = 0.1
    step_right: float = 0.99


@dataclass(frozen=True, slots=True)
class Problem:
    """``Problem((7, 5, -3))`` is ``7+5-3``: signed terms, the first one positive."""

    terms: tuple[int, ...]

    @property
    def question(self) -> str:
        return str(self.terms[0]) + "".join(f"{term:+d}" for term in self.terms[1:])

    @property
    def answer(self) -> int:
        return sum(self.terms)

    @property
    def is_held_out(self) -> bool:
        digest = hashlib.sha256(self.question.encode()).digest()
        return digest[0] < 256 * HELD_OUT_SHARE


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
    """(rendered prompt, response) pairs over training problems."""
    rng = random.Random(f"documents {seed}")
    for problem in problems(seed, count, difficulty, held_out=False):
        yield render(template, problem.question), respond(problem, mixture, rng)


def respond(problem: Problem, mixture: Mixture, rng: random.Random) -> str:
    """One response, of a kind and with mistakes drawn as the mixture says."""
    kind = rng.random()
    if kind < mixture.reasoned:
        return _reasoned(problem, mixture.step_right, rng)
    guess = problem.answer
    if rng.random() >= mixture.direct_right:
        guess = _misjudge(guess, rng)
    if kind < mixture.reasoned + mixture.plain:
        return str(guess)
    return f"<think>{guess}</think><answer>{guess}</answer>"


def _draw(rng: random.Random, num_terms: int) -> Problem:
    """Distinct digits with signs such that every running total stays in 0..99."""
    digits = rng.sample(range(1, 10), num_terms)
    terms = [digits[0]]
    for digit in digits[1:]:
        subtract = sum(terms) >= digit and rng.random() < 0.5
        terms.append(-digit if subtract else digit)
    return Problem(tuple(terms))


def _reasoned(problem: Problem, step_right: float, rng: random.Random) -> str:
    """Running totals, one line per term; a wrong step carries on from its wrong total."""
    total = problem.terms[0]
    lines = []
    for term in problem.terms[1:]:
        result = total + term
        if rng.random() >= step_right or result < 0:
            result = _misjudge(max(result, 0), rng)
        lines.append(f"{total}{term:+d}={result}")
        total = result
    return "<think>" + "\n".join(lines) + f"</think><answer>{total}</answer>"


def _misjudge(total: int, rng: random.Random) -> int:
    """A wrong total within 5 of the right one."""
    near = range(max(total - 5, 0), min(total + 5, MAX_TOTAL) + 1)
    return rng.choice([value for value in near if value != total])
