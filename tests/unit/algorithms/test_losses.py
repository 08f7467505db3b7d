"""Losses against numbers computed by hand."""

from dataclasses import replace
from math import exp

import pytest
import torch

from r1mega.algorithms.losses import ClippedSurrogate, k3, next_token_loss
from r1mega.learner.microbatch import Microbatch, make_microbatch
from r1mega.records import Sequence

CPU = torch.device("cpu")


def microbatch(**columns: tuple[float, ...]) -> Microbatch:
    """Two sequences: two targets with advantage 1, one target with advantage -2."""
    first = Sequence(
        uid="a",
        token_ids=(1, 2, 3),
        start=1,
        weight=0.25,
        advantage=1.0,
        sampler_logprobs=(-1.0, -2.0),
    )
    second = Sequence(
        uid="b", token_ids=(4, 5), start=1, weight=0.5, advantage=-2.0, sampler_logprobs=(-3.0,)
    )
    if columns:
        names = {name: (values[:2], values[2:]) for name, values in columns.items()}
        first = replace(first, **{name: pair[0] for name, pair in names.items()})
        second = replace(second, **{name: pair[1] for name, pair in names.items()})
    return make_microbatch((first, second), [0, 1], multiple=1, device=CPU)


def leaf(*values: float) -> torch.Tensor:
    return torch.tensor(values, requires_grad=True)


ENTROPIES = torch.tensor([0.1, 0.2, 0.3])


def test_microbatch_rows_point_at_the_token_before() -> None:
    batch = make_microbatch(
        (
            Sequence(uid="a", token_ids=(1, 2, 3), start=2),
            Sequence(uid="b", token_ids=(4, 5, 6, 7), start=1),
        ),
        [1, 0],
        multiple=4,
        device=CPU,
    )
    assert batch.tokens_T.tolist() == [4, 5, 6, 7, 1, 2, 3, 0]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 0, 1, 2, 0]
    assert batch.targets.rows_L.tolist() == [0, 1, 2, 5]
    assert batch.targets.ids_L.tolist() == [5, 6, 7, 3]
    assert batch.packed.cu_seqlens_q.tolist() == [0, 4, 7, 8]
    assert batch.packed.padding_T.tolist() == [False] * 7 + [True]
    assert batch.sequence_R.tolist() == [0, 0, 0, 1]


def test_an_empty_microbatch_is_padding_without_targets() -> None:
    batch = make_microbatch((), [], multiple=2, device=CPU)
    assert (batch.tokens_T.tolist(), batch.targets.rows_L.tolist()) == ([0, 0], [])


def test_next_token_loss_is_the_weighted_sum() -> None:
    result = next_token_loss(leaf(-1.0, -2.0, -3.0), ENTROPIES, microbatch())
    assert result.loss.item() == pytest.approx(0.25 * 3 + 0.5 * 3)
    assert result.sums["policy/entropy"].item() == pytest.approx(0.25 * 0.3 + 0.5 * 0.3)


def test_first_update_has_ratio_one_and_the_policy_gradient() -> None:
    logprobs = leaf(-1.0, -2.0, -3.0)
    result = ClippedSurrogate(clip_low=0.2, clip_high=0.2, kl_coef=0.0)(
        logprobs, ENTROPIES, microbatch()
    )
    result.loss.backward()
    # loss = -sum w rho A with rho = 1: gradient -w A
    assert result.loss.item() == pytest.approx(-(0.25 + 0.25) * 1.0 + 0.5 * 2.0)
    assert logprobs.grad.tolist() == pytest.approx([-0.25, -0.25, 1.0])
    assert result.maxima["policy/ratio_max"].item() == 1.0


def test_clipping_takes_the_pessimistic_side() -> None:
    # ratios e^0.5, e^-0.5, e^0.5 with advantages 1, 1, -2
    batch = microbatch(policy_logprobs=(-1.5, -1.5, -3.5))
    logprobs = leaf(-1.0, -2.0, -3.0)
    result = ClippedSurrogate(clip_low=0.2, clip_high=0.3, kl_coef=0.0)(logprobs, ENTROPIES, batch)
    gains = [1.3 * 1, exp(-0.5) * 1, exp(0.5) * -2]  # clipped; min(0.607, 0.8); min(-3.3, -2.6)
    expected = -(0.25 * gains[0] + 0.25 * gains[1] + 0.5 * gains[2])
    assert result.loss.item() == pytest.approx(expected)
    result.loss.backward()
    assert logprobs.grad.tolist() == pytest.approx([0.0, -0.25 * exp(-0.5), exp(0.5)])
    assert result.sums["policy/clip_fraction"].item() == pytest.approx(0.25)  # the first only


def test_r1s_clip_of_ten_never_binds_from_below() -> None:
    batch = microbatch(policy_logprobs=(-1.0, 2.0, -3.0))
    loss = ClippedSurrogate(clip_low=10.0, clip_high=10.0, kl_coef=0.0)
    result = loss(leaf(-1.0, -2.0, -3.0), ENTROPIES, batch)
    assert result.sums["policy/clip_fraction"].item() == 0.0


def test_sequence_ratio_multiplies_the_tokens_of_a_response() -> None:
    batch = microbatch(policy_logprobs=(-1.2, -2.3, -3.1))
    loss = ClippedSurrogate(clip_low=10.0, clip_high=10.0, kl_coef=0.0, ratio="sequence")
    result = loss(leaf(-1.0, -2.0, -3.0), ENTROPIES, batch)
    expected = -(0.5 * exp(0.5) * 1.0 + 0.5 * exp(0.1) * -2.0)
    assert result.loss.item() == pytest.approx(expected)


def test_kl_is_the_k3_estimator() -> None:
    assert k3(torch.tensor([-1.0]), torch.tensor([-1.5])).item() == pytest.approx(exp(-0.5) - 0.5)
    batch = microbatch(reference_logprobs=(-1.5, -2.0, -2.0))
    loss = ClippedSurrogate(clip_low=0.2, clip_high=0.2, kl_coef=0.1)
    result = loss(leaf(-1.0, -2.0, -3.0), ENTROPIES, batch)
    kl = 0.25 * (exp(-0.5) + 0.5 - 1) + 0.5 * (exp(1.0) - 1 - 1)
    assert result.sums["policy/kl"].item() == pytest.approx(kl)
    assert result.loss.item() == pytest.approx(-(0.5 - 1.0) + 0.1 * kl)


def test_entropy_raises_the_objective_and_is_reported_without_gradient() -> None:
    entropies = leaf(0.1, 0.2, 0.3)
    loss = ClippedSurrogate(clip_low=0.2, clip_high=0.2, kl_coef=0.0, entropy_coef=0.1)
    result = loss(leaf(-1.0, -2.0, -3.0), entropies, microbatch())
    result.loss.backward()
    entropy = 0.25 * 0.3 + 0.5 * 0.3
    assert result.loss.item() == pytest.approx(-(0.5 - 1.0) - 0.1 * entropy)
    assert entropies.grad.tolist() == pytest.approx([-0.025, -0.025, -0.05])
    assert result.sums["policy/entropy"].item() == pytest.approx(entropy)
    assert not result.sums["policy/entropy"].requires_grad


def test_truncated_importance_sampling_caps_the_correction() -> None:
    # policy / sampler: e^0.4 -> capped at 1.2; e^-0.3; 1
    batch = microbatch(policy_logprobs=(-0.6, -2.3, -3.0))
    loss = ClippedSurrogate(clip_low=10.0, clip_high=10.0, kl_coef=0.0, importance_cap=1.2)
    result = loss(leaf(-0.6, -2.3, -3.0), ENTROPIES, batch)
    expected = -(0.25 * 1.2 + 0.25 * exp(-0.3) + 0.5 * -2.0)
    assert result.loss.item() == pytest.approx(expected)
    assert result.maxima["mismatch/max"].item() == pytest.approx(0.4)


def test_mismatch_beyond_a_factor_of_two_is_outside_the_band() -> None:
    # policy / sampler: e^0.8, e^-0.6, e^-0.7 with weights 0.25, 0.25, 0.5
    batch = microbatch(policy_logprobs=(-0.2, -2.6, -3.7))
    loss = ClippedSurrogate(clip_low=10.0, clip_high=10.0, kl_coef=0.0, importance_cap=1.5)
    sums = loss(leaf(-0.2, -2.6, -3.7), ENTROPIES, batch).sums
    assert sums["mismatch/outside_band"].item() == pytest.approx(0.75)
    assert sums["mismatch/capped"].item() == pytest.approx(0.25)
    uncapped = ClippedSurrogate(clip_low=10.0, clip_high=10.0, kl_coef=0.0)
    assert "mismatch/capped" not in uncapped(leaf(-0.2, -2.6, -3.7), ENTROPIES, batch).sums
