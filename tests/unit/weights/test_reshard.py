"""Every engine byte once, from a rank that has it: by brute force, and by the plan's own proof."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1mega.config import schema
from r1mega.config.load import load
from r1mega.parallel.layout import Layout
from r1mega.weights.engine_names import EngineLayout, engine_slices
from r1mega.weights.names import fp8_weights, parameter_slices
from r1mega.weights.proof import prove
from r1mega.weights.regions import Region, volume
from r1mega.weights.reshard import Flow, Plan, Transfer, plan
from tests.unit.weights.layouts import MODELS, V3, engine_layouts, learners, spec_of

CONFIGS = Path(__file__).parents[3] / "configs"
# Every width of it divides by 256, so that FP8 can be cut in two.
WIDE = schema.Model(
    vocab_size=128,
    hidden_size=256,
    intermediate_size=256,
    moe_intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=128,
    kv_lora_rank=120,
    qk_nope_head_dim=128,
    qk_rope_head_dim=128,
    v_head_dim=128,
    n_routed_experts=2,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
)
WIDTHS = {"float8_e4m3fn": 1, "float32": 4, None: 2}


def slices(region: Region) -> tuple[slice, ...]:
    return tuple(slice(*span) for span in region)


def assert_carried_out(made: Plan) -> None:
    """Follow every transfer from both ends and count, element by element."""
    sent: list[Transfer] = []
    for rank, num_bytes in enumerate(made.sent_bytes):
        mine = list(made.sends(rank))
        held = {s.hf_name: s for s in parameter_slices(made.model, made.learner, rank, made.spec)}
        assert num_bytes == sum(volume(t.region) * WIDTHS[t.dtype] for t in mine)
        assert all(t.source == rank for t in mine)
        for transfer in mine:
            block = 128 if transfer.hf_name.endswith("_scale_inv") else 1
            piece = held[transfer.hf_name.removesuffix("_scale_inv")]
            for (start, stop), (a, b), size in zip(
                piece.region, transfer.region, piece.hf_shape, strict=True
            ):
                assert start <= a * block
                assert min(b * block, size) <= stop
        sent += mine
    received: list[Transfer] = []
    for engine, layout in enumerate(made.engines):
        for rank in range(layout.tp):
            mine = list(made.receives(engine, rank))
            assert_filled(made, engine, rank, mine)
            received += mine
    assert len(sent) == len(set(sent)) == len(received)
    assert set(sent) == set(received)
    total = sum(volume(t.region) * WIDTHS[t.dtype] for t in received)
    assert total == made.bytes == made.minimum_bytes


def assert_filled(made: Plan, engine: int, rank: int, transfers: list[Transfer]) -> None:
    """Every element of every parameter is written once, and is the one that belongs there: for a
    value, each has its index in the Hugging Face tensor."""
    pieces = engine_slices(made.model, made.engines[engine], rank)
    indices = {s.hf_name: np.arange(np.prod(s.hf_shape)).reshape(s.hf_shape) for s in pieces}
    dtypes = {s.hf_name: s.dtype for s in pieces}
    extents: dict[str, list[tuple[int, ...]]] = {}
    for piece in pieces:
        extents.setdefault(piece.parameter, []).append(tuple(stop for _, stop in piece.target))
    written = {name: np.full(np.max(stops, axis=0), -1) for name, stops in extents.items()}
    for t in transfers:
        place = written[t.parameter][slices(t.target)]
        assert (place == -1).all()
        place[...] = indices[t.hf_name][slices(t.region)].reshape(place.shape)
        assert t.dtype == dtypes[t.hf_name]
    for piece in pieces:
        there = written[piece.parameter][slices(piece.target)]
        wanted = indices[piece.hf_name][slices(piece.region)]
        assert np.array_equal(there.reshape(wanted.shape), wanted)


@pytest.mark.parametrize("case", MODELS)
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_any_learner_to_any_engines(case: str, data: st.DataObject) -> None:
    model = MODELS[case]
    engines = data.draw(st.lists(engine_layouts(model), min_size=1, max_size=3))
    made = plan(model, data.draw(learners(model)), engines, spec=spec_of(model))
    prove(made)
    assert_carried_out(made)


@pytest.mark.parametrize("learner", [{"tp": 2}, {"tp": 2, "ep": 2, "world": 4}, {"etp": 2}, {}])
def test_fp8_engines_beside_others(learner: dict[str, int]) -> None:
    engines = [
        EngineLayout(tp=2, dp=2, quantized=True),
        EngineLayout(tp=2, ep=2),
        EngineLayout(tp=1, quantized=True),
    ]
    made = plan(WIDE, Layout(**({"world": 2} | learner)), engines)
    prove(made)
    assert_carried_out(made)
    sender = {(t.hf_name, t.engine, t.rank): t.source for t in made.receives(2, 0)}
    for name in fp8_weights(WIDE):  # where codes are cut, so are their scales
        assert sender[name + "_scale_inv", 2, 0] == sender[name, 2, 0]


def test_a_learner_that_cuts_blocks_is_sent_to_broadcast() -> None:
    with pytest.raises(ValueError, match=r"o_proj.weight\[.*\] of \[256, 256\].*sync=broadcast"):
        plan(WIDE, Layout(world=4, tp=4), [EngineLayout(quantized=True)])


def broken(made: Plan, flow: Flow, **changes: object) -> Plan:
    flows = tuple(replace(f, **changes) if f is flow else f for f in made.flows)
    return replace(made, flows=flows)


def test_the_proof_finds_what_is_wrong() -> None:
    made = plan(V3, Layout(world=4, tp=2, pp=2, ep=2), [EngineLayout(tp=2), EngineLayout(tp=2)])
    prove(made)
    flow = next(f for f in made.flows if f.names[0].endswith("q_b_proj.weight"))
    route, items = flow.routes[0], flow.bounds[-1]
    (first, last), columns = route.region
    short = replace(route, region=((first, last - 1), columns), num_bytes=0)
    counted = replace(short, num_bytes=volume(short.region) * 2)
    elsewhere = replace(route, targets=(*route.targets[:-1], (1, 1)))
    cases: list[tuple[Plan, str]] = [
        (broken(made, flow, bounds=(*flow.bounds[:-1], items - 1)), "not each of them once"),
        (broken(made, flow, bounds=(items, *flow.bounds[1:-1], 0)), "not each of them once"),
        (broken(made, flow, sources=(3,), bounds=(0, items)), "what it has not"),
        (broken(made, flow, routes=(short,)), "counted wrongly"),
        (broken(made, flow, routes=(counted,)), "of its"),
        (
            broken(made, flow, routes=(elsewhere,)),
            "engines 0 and 1, which are laid out alike",
        ),
        (replace(made, flows=made.flows[1:]), "is sent never"),
        (replace(made, flows=(*made.flows, flow)), "overlap|is sent never, twice"),
        (broken(made, flow, dtype="float32"), "counted wrongly"),
        (replace(made, sent_bytes=(0,) * 4), "0 shared out"),
    ]
    for wrong, sentence in cases:
        with pytest.raises(ValueError, match=sentence):
            prove(wrong)


def test_the_proof_finds_a_wrong_place() -> None:
    layout, name = EngineLayout(tp=2), "model.layers.0.mlp.up_proj.weight"
    made = plan(V3, Layout(world=2, tp=2), [layout])
    tensors = made.tensors[layout]
    moved = {**tensors, name: replace(tensors[name], above=tensors[name].above - 1)}
    with pytest.raises(ValueError, match=f"{name} would land at .*gate_up_proj.weight, not"):
        prove(replace(made, tensors={layout: moved}))


def test_replicas_share_the_sending() -> None:
    """Four replicas of everything, to engines of unequal size: equal but for single tensors."""
    made = plan(V3, Layout(world=4), [EngineLayout(tp=2), EngineLayout(tp=4, ep=2), EngineLayout()])
    assert max(made.sent_bytes) / (made.bytes / 4) < 1.02


def test_a_large_tensor_is_shared_too() -> None:
    """An embedding that is half of the network, on eight replicas, for one rank of an engine."""
    model = schema.Model(
        architecture="qwen2", vocab_size=151_936, hidden_size=896, tie_word_embeddings=True
    )
    made = plan(model, Layout(world=8), [EngineLayout(fused=False)])
    prove(made)
    assert max(made.sent_bytes) / (made.bytes / 8) < 1.05


@pytest.mark.parametrize("tp", [1, 8])
def test_671b_moves_no_byte_too_many(tp: int) -> None:
    """256 ranks to a bf16 engine of 32 and an FP8 one of 16. A rank of the 32 holds 40.92 GiB."""
    model = load([str(CONFIGS / "model/deepseek_v3.yaml"), "stage.kind=sft"]).model
    learner = Layout(
        world=256, tp=tp, pp=16, ep=16, layers_in_first_stage=3, layers_in_last_stage=2
    )
    engines = [EngineLayout(tp=32, ep=32), EngineLayout(tp=16, ep=16, quantized=True)]
    made = plan(model, learner, engines)
    prove(made)
    fp8 = plan(model, learner, engines[1:])
    assert made.bytes == made.minimum_bytes
    assert round((made.bytes - fp8.bytes) / 32 / 2**30, 2) == 40.92
    for stage in range(16):
        sent = made.sent_bytes[16 * stage : 16 * (stage + 1)]
        assert max(sent) <= 1.01 * sum(sent) / 16
