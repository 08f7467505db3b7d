"""The bits of a row ignore how many rows there are: what batch invariance is built on."""

import pytest
import torch

from r1mega.rollout.engine.experts import EXPERT_ROWS, Routed, mix_all, mix_chosen
from r1mega.rollout.engine.plan import ROWS
from r1mega.rollout.engine.products import grouped, linear
from r1mega.rollout.engine.weights import MlpWeights

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


def test_experts_mix_alike_whether_all_or_the_chosen_compute():
    generator = torch.Generator().manual_seed(1)
    gate_up = torch.randn(6, 2 * 20, 32, generator=generator)
    down = torch.randn(32, 6, 20, generator=generator).transpose(0, 1)
    scores = torch.rand(3 * ROWS, 6, generator=generator)
    chosen = scores.topk(2)
    experts, routed = MlpWeights(gate_up, down), Routed(chosen.indices, chosen.values)
    x = torch.randn(3 * ROWS, 32, generator=generator)
    with torch.inference_mode():
        y = mix_all(experts, routed, x)
        torch.testing.assert_close(y, mix_chosen(experts, routed, x), rtol=1e-4, atol=1e-3)
