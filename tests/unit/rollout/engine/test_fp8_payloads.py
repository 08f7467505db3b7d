"""FP8 weights in an update: codes and scales belong together."""

import pytest
import torch

from r1mega.rollout.engine.updates import as_numbers
from r1mega.weights import fp8

NAME, SCALES = "a.weight", "a.weight_scale_inv"


def test_codes_become_what_they_stand_for_and_other_tensors_stay() -> None:
    weight, bias = torch.randn(200, 130), torch.randn(200)
    codes, scales = fp8.quantize(weight)
    found = as_numbers({SCALES: scales, "a.bias": bias, NAME: codes})
    assert list(found) == ["a.bias", NAME]
    assert torch.equal(found[NAME], fp8.dequantize(codes, scales))
    assert (found[NAME] - weight).abs().max() < 0.05 * weight.abs().max()
    assert found["a.bias"] is bias


def test_codes_or_scales_alone_are_refused_by_name() -> None:
    codes, scales = fp8.quantize(torch.randn(200, 130))
    with pytest.raises(ValueError, match=r"send 'a.weight_scale_inv' of shape \[2, 2\] in the sam"):
        as_numbers({NAME: codes})
    with pytest.raises(ValueError, match=r"'a.weight' comes in FP8: send"):
        as_numbers({NAME: codes, SCALES: scales[:1]})
    with pytest.raises(ValueError, match=r"scales 'a.weight_scale_inv' in this call but no weight"):
        as_numbers({SCALES: scales})
