"""Which parameters are compared, and what an engine's parameters should look like."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from r1mega.config.schema import Model
from r1mega.rollout.checksum import cpu_checksum
from r1mega.rollout.predict import Parameter, engine_bytes, engine_parameters, predicted_checksums
from r1mega.rollout.proof import Checksums, differing, sample
from r1mega.weights.engine_names import EngineLayout
from r1mega.weights.names import fp8_weights, hf_shapes

MODEL = Model(num_hidden_layers=2)


def tensors(model: Model = MODEL) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(s, generator=generator) for name, s in hf_shapes(model).items()}


def parameters(layout: EngineLayout, rank: int = 0) -> tuple[Parameter, ...]:
    return engine_parameters(MODEL, layout, rank, dtype=torch.bfloat16, checksum=cpu_checksum)


def test_every_parameter_is_in_some_sample_and_each_sample_is_small() -> None:
    all_of_them = parameters(EngineLayout(fused=False))
    chosen = [{p.name for p in sample(all_of_them, version)} for version in range(200)]
    assert set().union(*chosen) == {p.name for p in all_of_them}
    total = sum(p.num_bytes for p in all_of_them)
    sizes = [sum(p.num_bytes for p in all_of_them if p.name in names) for names in chosen]
    assert 0.1 * total < sum(sizes) / 200 < total / 5
    assert all(chosen)
    assert chosen[0] != chosen[1]


def test_every_replica_of_every_rank_has_to_agree() -> None:
    def answer(rank: int, checksum: str) -> dict[str, object]:
        return {"checksums": {"a": checksum}, "parallelism_info": [{"tp_rank": rank}]}

    expected = {(0, "a"): "zero", (1, "a"): "one"}
    good = [answer(1, "one"), answer(0, "zero"), answer(1, "one"), answer(0, "zero")]
    assert differing(good, expected) == []
    assert differing([*good, answer(1, "two")], expected) == [(1, "a")]
    assert differing([answer(0, "zero")], expected) == [(1, "a")]
    assert differing(good, {(0, "b"): "zero"}) == [(0, "b")]


def test_fused_parameters_are_put_together_as_sglang_has_them() -> None:
    held, layer = tensors(), "model.layers.1.mlp.experts."
    found = {}
    for rank in (0, 1):
        chosen = [p for p in parameters(EngineLayout(tp=2), rank) if p.name == f"{layer}w13_weight"]
        found |= predicted_checksums(chosen, lambda names: ((n, held[n]) for n in names))
    for rank in (0, 1):
        experts = [
            torch.cat(
                [held[f"{layer}{e}.{kind}_proj.weight"].chunk(2)[rank] for kind in ("gate", "up")]
            )
            for e in range(MODEL.n_routed_experts)
        ]
        assert found[rank, f"{layer}w13_weight"] == cpu_checksum(torch.stack(experts).bfloat16())


@pytest.mark.parametrize(
    ("vocab_size", "tp", "padded_ranks"), [(64, 1, []), (65, 1, [0]), (128, 2, []), (100, 2, [1])]
)
def test_padded_vocabularies_are_left_to_the_probe(
    vocab_size: int, tp: int, padded_ranks: list[int]
) -> None:
    model = replace(MODEL, vocab_size=vocab_size)
    for rank in range(tp):
        held = engine_parameters(
            model, EngineLayout(tp=tp), rank, dtype=torch.bfloat16, checksum=cpu_checksum
        )
        found = {p.name for p in held} & {"model.embed_tokens.weight", "lm_head.weight"}
        assert len(found) == (0 if rank in padded_ranks else 2)


def test_the_expert_bias_is_float32_and_quantized_weights_are_the_numbers_they_stand_for() -> None:
    held = tensors()
    chosen = parameters(EngineLayout(quantized=True, fused=False))
    collect = lambda names: ((name, held[name]) for name in names)  # noqa: E731
    plain = predicted_checksums(chosen, collect)
    rounded = predicted_checksums(chosen, collect, fp8_weights(MODEL))
    assert {name for (_, name), value in plain.items() if rounded[0, name] != value} == fp8_weights(
        MODEL
    )
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert plain[0, bias] == cpu_checksum(held[bias])


def test_ranks_that_get_no_tensors_predict_nothing_but_read_the_stream() -> None:
    asked = []

    def collect(names):
        asked.extend(names)
        return ((name, None) for name in names)

    checksums = Checksums(
        parameters=partial(
            engine_parameters,
            MODEL,
            EngineLayout(tp=2),
            dtype=torch.bfloat16,
            checksum=cpu_checksum,
        ),
        ranks_per_engine=2,
        collect=collect,
        scope="all",
    )
    assert checksums.compare((), 1) == (0, {})
    assert set(asked) == set(hf_shapes(MODEL))


@pytest.mark.parametrize(
    ("layout", "factor"), [(EngineLayout(fused=False), 1), (EngineLayout(tp=2, dp=2), 2)]
)
def test_what_an_engine_has_to_receive(layout: EngineLayout, factor: int) -> None:
    """With dp-attention each rank holds all of attention."""
    sizes = {name: torch.Size(shape).numel() for name, shape in hf_shapes(MODEL).items()}
    attention = sum(size for name, size in sizes.items() if ".self_attn." in name)
    needed = engine_bytes(MODEL, layout, lambda name: 2)
    assert needed >= 2 * (sum(sizes.values()) + (factor - 1) * attention)
    assert (needed == 2 * sum(sizes.values())) == (factor == 1)
