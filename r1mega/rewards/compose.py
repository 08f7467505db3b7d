"""One reward from weighted parts, and what a batch of scores says.

``value`` is the weighted sum; ``parts`` stay unweighted, so that accuracy means the same whatever
its weight. A score with an error has value 0 but says nothing about the response: whoever trains
leaves it out, and the metrics here count it apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor
from statistics import fmean, pstdev

from r1mega.config.schema import Rewards
from r1mega.records import Prompt, Reward, Sample, Score
from r1mega.rewards.format import format_reward
from r1mega.rewards.math import MathReward


@dataclass(frozen=True, slots=True)
class WeightedReward:
    """The sum of (weight, reward) terms; ``close()`` ends the workers."""

    terms: tuple[tuple[float, Reward], ...]
    math: MathReward | None

    def __call__(self, pairs: list[tuple[Prompt, Sample]]) -> list[Score]:
        weights = [weight for weight, _ in self.terms]
        columns = [reward(pairs) for _, reward in self.terms]
        return [weighted_sum(weights, scores) for scores in zip(*columns, strict=True)]

    def close(self) -> None:
        if self.math is not None:
            self.math.close()


def compose(rewards: Rewards) -> WeightedReward:
    """The reward that the section describes; a part with weight 0 is neither computed nor shown."""
    terms: list[tuple[float, Reward]] = []
    math = None
    if rewards.accuracy:
        math = MathReward(num_workers=rewards.math_workers, cpu_seconds=rewards.math_timeout_s)
        terms.append((rewards.accuracy, math))
    if rewards.format:
        terms.append((rewards.format, format_reward))
    if not terms:
        raise ValueError("rewards.accuracy and rewards.format are both 0: give one of them weight")
    return WeightedReward(tuple(terms), math)


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
    allowed = floor(max_error_fraction * len(scores))
    if len(errors) > allowed:
        raise RuntimeError(
            f"{len(errors)} of {len(scores)} rewards failed (rewards.max_error_fraction="
            f"{max_error_fraction:g} allows {allowed}); the first: {errors[0]}; "
            "repair the grader, or raise the limit to train on the rest"
        )
