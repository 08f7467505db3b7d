"""One reward from weighted parts, and what a batch of scores says.

``value`` is the weighted sum; ``parts`` stay unweighted, so that accuracy means the same whatever
its weight. A score with an error has value 0 but says nothing about the response: whoever trains
leaves it out, and the metrics here count it apart.
"""

import math
from collections.abc import Sequence
from statistics import fmean, pstdev

from r1mega.config.schema import Rewards
from r1mega.records import Prompt, Sample, Score
from r1mega.rewards.format import follows_format
from r1mega.rewards.math import MathReward


class FormatReward:
    """1 for a response in the template of R1-Zero, else 0."""

    def __call__(self, pairs: list[tuple[Prompt, Sample]]) -> list[Score]:
        values = [float(follows_format(sample.text)) for _, sample in pairs]
        return [
            Score(value=value, parts={"format": value}, reason="" if value else "wrong format")
            for value in values
        ]

    def close(self) -> None:
        """Nothing to end."""


class WeightedReward:
    """The sum of (weight, reward) terms."""

    def __init__(self, terms: Sequence[tuple[float, MathReward | FormatReward]]) -> None:
        self._terms = tuple(terms)

    def __call__(self, pairs: list[tuple[Prompt, Sample]]) -> list[Score]:
        weights = [weight for weight, _ in self._terms]
        columns = [reward(pairs) for _, reward in self._terms]
        return [weighted_sum(weights, scores) for scores in zip(*columns, strict=True)]

    def close(self) -> None:
        for _, reward in self._terms:
            reward.close()


def compose(rewards: Rewards) -> WeightedReward:
    """The reward that the section describes; a part with weight 0 is neither computed nor shown."""
    terms: list[tuple[float, MathReward | FormatReward]] = []
    if rewards.accuracy:
        workers, seconds = rewards.math_workers, rewards.math_timeout_s
        terms.append((rewards.accuracy, MathReward(num_workers=workers, cpu_seconds=seconds)))
    if rewards.format:
        terms.append((rewards.format, FormatReward()))
    if not terms:
        raise ValueError("rewards.accuracy and rewards.format are both 0: give one of them weight")
    return WeightedReward(terms)


def weighted_sum(weights: Sequence[float], scores: Sequence[Score]) -> Score:
    """``weighted_sum([2, 1], [accuracy 1, format 0])`` has value 2 and both parts."""
    errors = [score.error for score in scores if score.error is not None]
    value = sum(weight * score.value for weight, score in zip(weights, scores, strict=True))
    return Score(
        value=0.0 if errors else value,
        parts={name: part for score in scores for name, part in score.parts.items()},
        reason="; ".join(score.reason for score in scores if score.reason),
        error="; ".join(errors) or None,
        timed_out=any(score.timed_out for score in scores),
    )


def reward_metrics(scores: Sequence[Score]) -> dict[str, float]:
    """reward/mean, reward/std and reward/<part> over the graded scores; reward/errors and
    reward/timeouts count scores. Without a graded score only the counts are there."""
    graded = [score for score in scores if score.error is None]
    metrics = {
        "reward/errors": float(len(scores) - len(graded)),
        "reward/timeouts": float(sum(score.timed_out for score in scores)),
    }
    if graded:
        values = [score.value for score in graded]
        metrics |= {"reward/mean": fmean(values), "reward/std": pstdev(values)}
        for name in graded[0].parts:
            metrics[f"reward/{name}"] = fmean(score.parts[name] for score in graded)
    return metrics


def check_errors(scores: Sequence[Score], max_error_fraction: float) -> None:
    """End the run when the machinery, not the policy, decides too many rewards of a rollout."""
    errors = [score.error for score in scores if score.error is not None]
    allowed = math.floor(max_error_fraction * len(scores))
    if len(errors) > allowed:
        raise RuntimeError(
            f"{len(errors)} of {len(scores)} rewards failed (rewards.max_error_fraction="
            f"{max_error_fraction:g} allows {allowed}); the first: {errors[0]}; "
            "repair the grader, or raise the limit to train on the rest"
        )
