"""Advantages, weights and the split of a rollout: values by hand."""

from math import sqrt

import pytest

from r1mega.algorithms.advantage import group_relative, token_weights
from r1mega.algorithms.grpo import rollout_metrics, split, training_sequences
from r1mega.config.schema import Algorithm
from r1mega.records import Batch, Group, Prompt, Sample, Score, Sequence, VersionRange


def sample(index: int, length: int, finish: str = "stop") -> Sample:
    return Sample(
        uid=f"p#{index}",
        prompt_uid="p",
        index=index,
        token_ids=tuple(range(length)),
        sampler_logprobs=(-1.0,) * length,
        text="",
        finish_reason=finish,  # type: ignore[arg-type]
        versions=(VersionRange(version=0, start=0, end=length),),
    )


def score(value: float, accuracy: float | None = None, error: str | None = None) -> Score:
    parts = {} if accuracy is None else {"accuracy": accuracy}
    return Score(value=value, parts=parts, error=error)


def group(samples: list[Sample], scores: list[Score]) -> Group:
    prompt = Prompt(uid="p", text="", token_ids=(7, 8, 9), question="", answer="")
    return Group(prompt=prompt, samples=tuple(samples), scores=tuple(scores))


def test_advantages_use_the_population_standard_deviation() -> None:
    # mean 1, deviations -1 -1 1 1, population std 1 (the sample std would be 1.155)
    assert group_relative([0.0, 0.0, 2.0, 2.0]) == [-1.0, -1.0, 1.0, 1.0]
    assert group_relative([0.0, 0.0, 1.0]) == pytest.approx([-1 / sqrt(2), -1 / sqrt(2), sqrt(2)])


def test_equal_rewards_say_nothing() -> None:
    assert group_relative([0.7, 0.7, 0.7]) == [0.0, 0.0, 0.0]


def test_token_weights_sum_to_one() -> None:
    assert token_weights([2, 4], "sample") == [0.25, 0.125]  # 1 / (2 samples * length)
    assert token_weights([2, 4], "token") == [1 / 6, 1 / 6]


def test_a_failed_grading_leaves_the_group_not_a_zero() -> None:
    scores = [score(2.0), score(0.0, error="worker died"), score(0.0), score(2.0)]
    sequences = training_sequences([group([sample(i, 2) for i in range(4)], scores)], Algorithm())
    assert [s.uid for s in sequences] == ["p#0", "p#2", "p#3"]
    expected = group_relative([2.0, 0.0, 2.0])
    assert [s.advantage for s in sequences] == expected


def test_sequences_hold_prompt_then_response() -> None:
    scores = [score(1.0), score(0.0)]
    first = training_sequences([group([sample(0, 2), sample(1, 3)], scores)], Algorithm())[0]
    assert first.token_ids == (7, 8, 9, 0, 1)
    assert (first.start, first.num_targets) == (3, 2)
    assert first.sampler_logprobs == (-1.0, -1.0)


def test_dynamic_sampling_looks_at_the_raw_accuracy() -> None:
    shaped = group([sample(0, 2), sample(1, 2)], [score(1.0, 1.0), score(0.5, 1.0)])
    mixed = group([sample(0, 2), sample(1, 2)], [score(1.0, 1.0), score(0.0, 0.0)])
    kept = training_sequences([shaped, mixed], Algorithm(drop_uniform_groups=True))
    assert len(kept) == 2
    assert len(training_sequences([shaped, mixed], Algorithm())) == 4


def test_overlong_samples_count_in_the_baseline_only() -> None:
    rows = group([sample(0, 2, "length"), sample(1, 2)], [score(0.0), score(1.0)])
    (kept,) = training_sequences([rows], Algorithm(mask_overlong=True))
    assert (kept.uid, kept.advantage) == ("p#1", 1.0)


def test_a_rollout_is_split_at_random_once() -> None:
    sequences = tuple(Sequence(uid=str(i), token_ids=(1, 2, 3), start=1) for i in range(10))
    batches = split(Batch(sequences), 4, "sample", "seed")
    assert sorted(len(b.sequences) for b in batches) == [2, 2, 3, 3]
    assert sorted(int(s.uid) for b in batches for s in b.sequences) == list(range(10))
    assert batches == split(Batch(sequences), 4, "sample", "seed")
    assert batches != split(Batch(sequences), 4, "sample", "another")
    for b in batches:
        total = sum(s.weight * s.num_targets for s in b.sequences)
        assert total == pytest.approx(1.0)


def test_rollout_metrics() -> None:
    one = group([sample(0, 2), sample(1, 4, "length")], [score(1.0), score(1.0)])
    two = group([sample(0, 6), sample(1, 8)], [score(1.0), score(0.0)])
    assert rollout_metrics([one, two]) == {
        "response/length_mean": 5.0,
        "response/length_max": 8.0,
        "response/truncated": 0.25,
        "prompt/length_mean": 3.0,
        "advantage/uniform": 0.5,
    }
