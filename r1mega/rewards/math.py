"""The accuracy reward of mathematics: does the response's answer equal the gold one?

Equal strings are equal answers and cost no worker. Everything else is math-verify's decision in a
worker process; a comparison that exceeds its CPU time or memory counts as wrong, for a right answer
is not that hard to compare; only a failing worker is an error, and never a wrong answer.
"""

from r1mega.records import Prompt, Sample, Score
from r1mega.rewards.answer import extract_answer
from r1mega.rewards.equality import load_equality
from r1mega.system.workers import Limits, Result, WorkerPool

MAX_ANSWER_CHARS = 2000  # what is longer is no final answer, and parsers are superlinear


class MathReward:
    """Scores accuracy 0 or 1; ``close()`` ends its workers."""

    def __init__(self, *, num_workers: int, cpu_seconds: float) -> None:
        limits = Limits(cpu_seconds=cpu_seconds)
        self._pool = WorkerPool(load_equality, num_workers=num_workers, limits=limits)

    def __call__(self, pairs: list[tuple[Prompt, Sample]]) -> list[Score]:
        questions = [
            (prompt.answer.strip(), extract_answer(sample.text)) for prompt, sample in pairs
        ]
        # A group often repeats itself: each distinct question is settled once.
        by_text = {question: _score_text(*question) for question in questions}
        scores = {question: score for question, score in by_text.items() if score is not None}
        unsettled = [question for question, score in by_text.items() if score is None]
        results = map(_score_result, self._pool.map(unsettled))
        scores |= zip(unsettled, results, strict=True)
        return [scores[question] for question in questions]

    def close(self) -> None:
        self._pool.close()


def _score_text(gold: str, answer: str | None) -> Score | None:
    """The score where the text alone settles it; None: ask a worker."""
    if answer is None:
        return _score(0.0, "no answer")
    if not answer:
        return _score(0.0, "empty answer")
    if answer == gold:
        return _score(1.0, "equal text")
    if len(answer) > MAX_ANSWER_CHARS:
        return _score(0.0, f"answer of {len(answer)} characters (limit {MAX_ANSWER_CHARS})")
    return None


def _score_result(result: Result) -> Score:
    if result.outcome == "error":
        return Score(value=0.0, parts={}, reason="not graded", error=f"math: {result.detail}")
    if result.outcome == "overrun":
        reason = f"comparison stopped: {result.detail}"
        return Score(value=0.0, parts={"accuracy": 0.0}, reason=reason, timed_out=True)
    return _score(1.0, "equal") if result.value else _score(0.0, "not equal")


def _score(accuracy: float, reason: str) -> Score:
    return Score(value=accuracy, parts={"accuracy": accuracy}, reason=reason)
