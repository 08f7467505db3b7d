"""The comparison of selftest: what is equal passes, what is not is named with its difference."""

import math

import pytest
import torch

from r1mega.stages.selftest import compare, random_batch

EXPECTED = {
    "embed": torch.tensor([1.0, -4.0]),
    "layer": torch.tensor([[0.5, 2.0]]),
    "head": torch.zeros(3),
}


def test_equal_tensors_pass() -> None:
    found = {name: tensor.clone() for name, tensor in EXPECTED.items()}
    comparison = compare("weights", EXPECTED, found, 1e-5)
    assert (comparison.tensors, comparison.largest, comparison.first) == (3, 0.0, None)
    assert str(comparison).endswith("3 tensors, largest difference 0.0e+00 (allowed 1e-05): ok")


def test_the_first_that_differs_is_named_not_the_worst() -> None:
    found = EXPECTED | {
        "layer": torch.tensor([[0.5, 2.1]]),
        "head": torch.tensor([0.0, 1.0, 0.0]),
    }
    comparison = compare("weights", EXPECTED, found, 1e-5)
    assert comparison.first == "layer"
    assert comparison.difference == pytest.approx(0.05)  # of the largest entry, 2
    assert comparison.largest > 1e20  # where zero was expected
    assert "the first that differs is layer, by 5.0e-02" in str(comparison)


@pytest.mark.parametrize(
    "found",
    [torch.tensor([1.0, math.nan]), torch.tensor([1.0, math.inf]), torch.ones(3), None],
    ids=["not a number", "infinite", "another shape", "absent"],
)
def test_what_cannot_be_compared_differs(found: torch.Tensor | None) -> None:
    tensors = {} if found is None else {"embed": found}
    comparison = compare("weights", {"embed": EXPECTED["embed"]}, tensors, 0.1)
    assert (comparison.first, comparison.difference) == ("embed", math.inf)


def test_the_batch_is_a_function_of_the_seed() -> None:
    assert random_batch(64, seed=1) == random_batch(64, seed=1) != random_batch(64, seed=2)
    assert all(
        1 <= s.start < len(s.token_ids) and len(s.policy_logprobs) == s.num_targets
        for s in random_batch(64, seed=1).sequences
    )
