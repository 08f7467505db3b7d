"""Draws follow the distribution, honour the seed, and report unrestricted log-probs."""

import math

import pytest
import torch

from r1mega.rollout.engine.sampling import Choice, draw, uniforms

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, -3.0, 1.5, 0.2])


def _draws(num: int, **how: float) -> list[int]:
    choices = [Choice(seed=7, position=i, **{"temperature": 1.0, **how}) for i in range(num)]
    return [d.token_id for d in draw(LOGITS.expand(num, -1).contiguous(), choices)]


def test_uniforms_depend_on_seed_and_position_only_and_fill_the_interval():
    numbers = uniforms([5] * 4096, list(range(4096)))
    assert torch.equal(numbers[100:101], uniforms([5], [100]))
    assert 0 <= numbers.min() < 0.002
    assert 0.998 < numbers.max() < 1
    counts = torch.histc(numbers, bins=16, min=0, max=1)
    assert ((counts - 256) ** 2 / 256).sum() < 37.7  # chi-square, 15 degrees, p = 0.001
    other = uniforms([6] * 4096, list(range(4096)))
    correlation = torch.corrcoef(torch.stack([numbers, other]))[0, 1]
    assert abs(correlation) < 4 / math.sqrt(4096)
    assert uniforms([-1], [0]).item() != uniforms([1], [0]).item()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_frequencies_are_the_softmax(temperature: float):
    counts = torch.bincount(torch.tensor(_draws(20000, temperature=temperature)), minlength=8)
    expected = torch.softmax(LOGITS / temperature, -1) * 20000
    assert ((counts - expected) ** 2 / expected).sum() < 24.3  # 7 degrees, p = 0.001


def test_top_k_top_p_min_p_keep_what_they_say():
    assert set(_draws(4000, top_k=3)) == {0, 6, 1}
    probabilities = torch.softmax(LOGITS, -1).sort(descending=True).values
    nucleus = int((probabilities.cumsum(0) - probabilities <= 0.75).sum())
    assert set(_draws(4000, top_p=0.75)) == set(LOGITS.argsort(descending=True)[:nucleus].tolist())
    assert set(_draws(4000, min_p=0.3)) == {0, 6, 1}  # e^-0.5, e^-1 and no other above 0.3


def test_of_equal_tokens_the_first_are_kept():
    flat = torch.zeros(1, 8)
    draws = [draw(flat, [Choice(seed=3, position=i, temperature=1.0, top_k=3)]) for i in range(200)]
    assert {drawn[0].token_id for drawn in draws} == {0, 1, 2}
    draws = [
        draw(flat, [Choice(seed=3, position=i, temperature=1.0, top_p=0.5)]) for i in range(200)
    ]
    assert {drawn[0].token_id for drawn in draws} == {0, 1, 2, 3, 4}


def test_logprobs_are_of_the_unrestricted_distribution_at_the_temperature():
    how = Choice(seed=1, position=2, temperature=0.5, top_k=2, suppressed=(0,))
    drawn = draw(LOGITS[None], [how])[0]
    assert drawn.token_id in (6, 1)
    expected = torch.log_softmax(LOGITS.double() / 0.5, -1)[drawn.token_id].item()
    assert drawn.logprob == pytest.approx(expected, abs=1e-6)


def test_temperature_zero_is_greedy_and_respects_suppression():
    assert set(_draws(50, temperature=0.0)) == {0}
    drawn = draw(LOGITS[None], [Choice(seed=1, position=0, temperature=0.0, suppressed=(0,))])[0]
    assert drawn.token_id == 6
    assert drawn.logprob == pytest.approx(torch.log_softmax(LOGITS, -1)[6].item(), abs=1e-6)


def test_logits_that_are_not_numbers_are_reported():
    broken = torch.stack([LOGITS, LOGITS * float("nan")])
    drawn = draw(broken, [Choice(seed=1, position=i, temperature=1.0) for i in range(2)])
    assert [d.finite for d in drawn] == [True, False]
