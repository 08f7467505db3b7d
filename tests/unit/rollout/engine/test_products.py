"""The bits of a row ignore how many rows there are: what batch invariance is built on."""

import pytest
import torch

from r1mega.rollout.engine.experts import EXPERT_ROWS
from r1mega.rollout.engine.plan import ROWS
from r1mega.rollout.engine.products import grouped, linear

WIDTHS = [(16, 8), (36, 20), (64, 128), (128, 192), (384, 320), (768, 384), (128, 2048)]


@pytest.mark.parametrize(("width_in", "width_out"), WIDTHS)
def test_linear_is_the_same_for_any_number_of_rows(width_in: int, width_out: int):
    generator = torch.Generator().manual_seed(width_in)
    x = torch.randn(12 * ROWS, width_in, generator=generator)
    weight = torch.randn(width_out, width_in, generator=generator)
    with torch.inference_mode():
        whole = linear(x, weight)
        for start in range(0, len(x), ROWS):
            for stop in range(start + ROWS, len(x) + 1, ROWS):
                assert torch.equal(linear(x[start:stop], weight), whole[start:stop])
    torch.testing.assert_close(whole.double(), x.double() @ weight.double().T, rtol=0, atol=2e-4)


@pytest.mark.parametrize(("width_in", "width_out"), WIDTHS)
def test_grouped_is_the_linear_of_every_expert(width_in: int, width_out: int):
    generator = torch.Generator().manual_seed(width_in)
    counts = [3 * EXPERT_ROWS, 0, EXPERT_ROWS, 9 * EXPERT_ROWS]
    weights = torch.randn(4, width_out, width_in, generator=generator)
    rows = torch.randn(EXPERT_ROWS, width_in, generator=generator)
    with torch.inference_mode():
        y = grouped(rows.repeat(sum(counts) // EXPERT_ROWS, 1), weights, counts)
        for expert, part in enumerate(y.split(counts)):
            alone = [EXPERT_ROWS if e == expert else 0 for e in range(4)]
            expected = grouped(rows, weights, alone)
            for block in part.unflatten(0, (-1, EXPERT_ROWS)):
                assert torch.equal(block, expected)
