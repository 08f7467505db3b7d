"""FLOPs against the published size of DeepSeek-V3 and numbers worked out by hand."""

from pathlib import Path

import pytest

from r1mega.config import Model, load
from r1mega.config.flops import crossover_tokens, flops_per_pair, flops_per_token

V3 = str(Path(__file__).parents[3] / "configs/model/deepseek_v3.yaml")


def test_deepseek_v3() -> None:
    model = load([V3, "stage.kind=sft"]).model
    # arXiv 2412.19437: 37B of 671B parameters are active, the input embedding among them.
    active = flops_per_token(model) / 2 + model.vocab_size * model.hidden_size
    assert active == pytest.approx(37.5e9, rel=0.01)
    assert flops_per_pair(model) == 2 * 61 * 128 * (128 + 64 + 128)
    assert crossover_tokens(model) == 29_316


def test_dense() -> None:
    model = Model(
        architecture="llama",
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    attention = 32 * 32 + 2 * 32 * 16 + 32 * 32
    assert flops_per_token(model) == 2 * (3 * (attention + 3 * 32 * 48) + 32 * 100)
    assert flops_per_pair(model) == 2 * 3 * 4 * (8 + 8)
    assert crossover_tokens(model) == 2 * flops_per_token(model) // flops_per_pair(model)
