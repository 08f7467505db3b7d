"""Draws follow the distribution, honour the seed, and report unrestricted log-probs."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from r1mega.rollout.engine.sampling import Choices, Drawn, draw, stream, uniforms

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, -3.0, 1.5, 0.2])


def _numbers(seed: int, positions: range) -> np.ndarray:
    return uniforms(np.full(len(positions), stream(seed)), np.array(positions))


def _drawn(
    logits: torch.Tensor, *, seed: int = 7, suppressed: int | None = None, **how: Any
) -> Drawn:
    num, vocab_size = logits.shape
    is_suppressed = np.tile(np.arange(vocab_size) == suppressed, (num, 1))
    return draw(
        logits,
        Choices(
            uniforms_N=_numbers(seed, range(num)),
            temperatures_N=np.full(num, how.get("temperature", 1.0), dtype=np.float32),
            top_p_N=np.full(num, how.get("top_p", 1.0)),
            top_k_N=np.full(num, how.get("top_k", vocab_size)),
            min_p_N=np.full(num, how.get("min_p", 0.0)),
            suppressed_NV=None if suppressed is None else is_suppressed,
        ),
    )


def _draws(num: int, **how: Any) -> list[int]:
    return _drawn(LOGITS.expand(num, -1), **how).token_ids_N.tolist()


def test_uniforms_depend_on_seed_and_position_only_and_fill_the_interval():
    numbers = _numbers(5, range(4096))
    assert numbers[100:101] == _numbers(5, range(100, 101))
    assert 0 <= numbers.min() < 0.002
    assert 0.998 < numbers.max() < 1
    counts, _ = np.histogram(numbers, bins=16, range=(0, 1))
    assert ((counts - 256) ** 2 / 256).sum() < 37.7  # chi-square, 15 degrees, p = 0.001
    correlation = np.corrcoef(numbers, _numbers(6, range(4096)))[0, 1]
    assert abs(correlation) < 4 / math.sqrt(4096)
    assert _numbers(-1, range(1)) != _numbers(1, range(1))


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
    flat = torch.zeros(200, 8)
    assert set(_drawn(flat, top_k=3).token_ids_N) == {0, 1, 2}
    assert set(_drawn(flat, top_p=0.5).token_ids_N) == {0, 1, 2, 3, 4}


def test_every_row_has_its_own_restrictions():
    choices = Choices(
        uniforms_N=np.full(4, 0.999),
        temperatures_N=np.array([1.0, 0.0, 1.0, 1.0], dtype=np.float32),
        top_p_N=np.array([1.0, 1.0, 1.0, 0.3]),
        top_k_N=np.array([8, 8, 2, 8]),
        min_p_N=np.zeros(4),
        suppressed_NV=np.arange(8) == np.array([[9], [0], [9], [9]]),
    )
    drawn = draw(LOGITS.expand(4, -1), choices)
    assert drawn.token_ids_N.tolist() == [7, 6, 6, 0]


def test_logprobs_are_of_the_unrestricted_distribution_at_the_temperature():
    drawn = _drawn(LOGITS[None], temperature=0.5, top_k=2, suppressed=0)
    token = drawn.token_ids_N.item()
    assert token in (6, 1)
    expected = torch.log_softmax(LOGITS.double() / 0.5, -1)[token].item()
    assert drawn.logprobs_N.item() == pytest.approx(expected, abs=1e-6)


def test_temperature_zero_is_greedy_and_respects_suppression():
    assert set(_draws(50, temperature=0.0)) == {0}
    drawn = _drawn(LOGITS[None], temperature=0.0, suppressed=0)
    assert drawn.token_ids_N.item() == 6
    expected = torch.log_softmax(LOGITS, -1)[6].item()
    assert drawn.logprobs_N.item() == pytest.approx(expected, abs=1e-6)


def test_logits_that_are_not_numbers_are_reported():
    drawn = _drawn(torch.stack([LOGITS, LOGITS * float("nan")]), top_k=3)
    assert drawn.is_finite_N.tolist() == [True, False]
