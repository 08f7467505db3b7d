"""Every layout trains as a single process does: log-probs, metrics and weights of four steps.

fp32 on gloo. All layouts of one world size share their processes; a single failing one takes those
behind it along. What is compared, and within which tolerance: ``layouts.deviations``.
"""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.draws import draw
from tests.distributed.launch import run_ranks
from tests.distributed.layouts import NEAR_TIE, RELATIVE, Case, Facts, deviations, read_facts

pytestmark = pytest.mark.timeout(1800)

SIX = {"num_hidden_layers": 6}
EIGHT = {"num_hidden_layers": 8}
OVERLAP = {"overlap_grad_reduce": True, "bucket_parameters": 2000}
GATHER = OVERLAP | {"overlap_param_gather": True}
ALLGATHER = {"dispatcher": "allgather"}
FULL = {"recompute": "full"}
SELECTIVE = {"recompute": "selective"}
MODULES = SELECTIVE | {"recompute_modules": ["mla_up_proj", "mlp", "moe", "shared_experts"]}


def case(axes: str = "", world: int = 2, **rest: Any) -> Case:
    """``case("tp2 first1", 4)``: the axes as their names and sizes, the ranks, fields of Case."""
    names = {"first": "layers_in_first_stage", "last": "layers_in_last_stage"}
    pairs = re.findall(r"([a-z]+)(\d+)", axes)
    return Case(world=world, axes={names.get(a, a): int(size) for a, size in pairs}, **rest)


AXES = {
    "dp2": case(),
    "dp3": case(world=3),
    "dp4": case(world=4),
    "tp2": case("tp2"),
    "tp4": case("tp4", 4),
    "pp2": case("pp2"),
    "pp2, uneven": case("pp2 first1"),
    "pp3": case("pp3", 3, model=SIX),
    "pp3, uneven on both ends": case("pp3 first1 last2", 3, model={"num_hidden_layers": 5}),
    "pp4": case("pp4", 4),
    "vpp2": case("pp2 vpp2"),
    "vpp2, uneven": case("pp2 vpp2 first2", model=SIX),
    "vpp2 of pp3, uneven": case("pp3 vpp2 last4", 3, model=EIGHT),
    "vpp2 of pp4": case("pp4 vpp2", 4, model=EIGHT),
    "ep2": case("ep2"),
    "ep4": case("ep4", 4),
    "ep2, allgather": case("ep2", learner=ALLGATHER),
    "ep4, allgather": case("ep4", 4, learner=ALLGATHER),
    "etp2": case("etp2"),
    "etp2 of dp4": case("etp2", 4),
    "etp2 ep2, allgather": case("etp2 ep2", 4, learner=ALLGATHER),
    "cp2": case("cp2"),
    "cp3": case("cp3", 3, model={"rope_scaling": None}, batch={"num_sequences": 8, "seed": 3}),
    "cp4": case("cp4", 4),
}
HOW = {
    "full recompute, tp2": case("tp2", learner=FULL),
    "full recompute, pp2": case("pp2", learner=FULL),
    "full recompute, vpp2": case("pp2 vpp2", learner=FULL),
    "selective recompute, cp2": case("cp2", learner=SELECTIVE),
    "selective recompute, vpp2": case("pp2 vpp2", learner=SELECTIVE),
    "recompute of modules, vpp2": case("pp2 vpp2", learner=MODULES),
    "recompute of modules, tp2 pp2": case("tp2 pp2", 4, learner=MODULES),
    "overlap, dp2": case(learner=OVERLAP),
    "overlap, cp2": case("cp2", learner=OVERLAP),
    "overlap, pp2 of dp2": case("pp2", 4, learner=OVERLAP),
    "overlap, vpp2 ep2": case("pp2 vpp2 ep2", 4, learner=OVERLAP),
    "gather, dp2": case(learner=GATHER),
    "gather, cp2 ep2": case("cp2 ep2", 4, learner=GATHER),
    "gather, tied, pp2 of dp2": case("pp2", 4, learner=GATHER, network="qwen2 tied"),
    "microbatches of 16 tokens, pp2": case("pp2", learner={"tokens_per_microbatch": 16}),
    "microbatches of 24 tokens, cp2": case("cp2", learner={"tokens_per_microbatch": 24}),
    "a microbatch of 4096 tokens, dp2": case(learner={"tokens_per_microbatch": 4096}),
    "another order, dp2": case(shuffled=True),
    "another order, cp2": case("cp2", shuffled=True),
    "one sequence, dp2": case(batch={"num_sequences": 1}),
    "one sequence, cp2 of dp2": case("cp2", 4, batch={"num_sequences": 1}),
    "one sequence, vpp2": case("pp2 vpp2", batch={"num_sequences": 1}),
    "one sequence, ep2, allgather": case("ep2", learner=ALLGATHER, batch={"num_sequences": 1}),
    "llama, cp2": case("cp2", network="llama"),
    "qwen2, tied, vpp2": case("pp2 vpp2", network="qwen2 tied"),
    "qwen2, cp2 tp2": case("cp2 tp2", 4, network="qwen2"),
    "without query lora, tp2 cp2": case("tp2 cp2", 4, network="deepseek_v3 without query lora"),
}
COMBINATIONS = {
    "tp2 cp2": case("tp2 cp2", 4),
    "tp2 ep2 etp2": case("tp2 ep2 etp2", 4),
    "tp2 ep2 etp2, allgather": case("tp2 ep2 etp2", 4, learner=ALLGATHER),
    "tp4 ep4": case("tp4 ep4", 4),
    "cp2 pp2": case("cp2 pp2", 4),
    "cp2 pp2 vpp2": case("cp2 pp2 vpp2", 4),
    "cp2 ep2": case("cp2 ep2", 4),
    "cp2 ep4": case("cp2 ep4", 4),
    "pp2 ep2, allgather": case("pp2 ep2", 4, learner=ALLGATHER),
    "tp2 pp2 ep2": case("tp2 pp2 ep2", 4),
    "tp2 pp2 vpp2 ep2": case("tp2 pp2 vpp2 ep2", 4),
    "tp2 pp2 ep2, full recompute, uneven": case("tp2 pp2 ep2 last1", 4, learner=FULL),
    "8: tp2 pp2 ep2 cp2": case("tp2 pp2 ep2 cp2", 8),
    "8: tp2 pp2 ep4 cp2": case("tp2 pp2 ep4 cp2", 8),
    "8: cp2 pp2 ep2": case("cp2 pp2 ep2", 8),
    "8: tp2 pp2 vpp2 ep2, overlap": case("tp2 pp2 vpp2 ep2", 8, learner=OVERLAP),
    "8: cp4 tp2": case("cp4 tp2", 8),
    "8: tp2 pp4 ep2": case("tp2 pp4 ep2", 8),
    "8: tp2 cp2 pp2 ep2 etp2, full recompute": case("tp2 cp2 pp2 ep2 etp2", 8, learner=FULL),
    "8: tp2 cp2 ep4 etp2, allgather": case("tp2 cp2 ep4 etp2", 8, learner=ALLGATHER),
    "8: ep8": case("ep8", 8),
    "8: tp2 ep2, gather": case("tp2 ep2", 8, learner=GATHER),
}
MATRIX = AXES | HOW | COMBINATIONS
COSTLY = {  # eight processes that only join what others test in fewer
    "8: tp2 pp2 ep4 cp2",
    "8: cp2 pp2 ep2",
    "8: cp4 tp2",
    "8: tp2 pp4 ep2",
    "8: tp2 cp2 ep4 etp2, allgather",
    "8: tp2 ep2, gather",
}
DRAWN = {f"draw {seed}": draw(seed, worlds=(2, 3, 4)) for seed in (0, 1, 2, 3)}
SOAKED = {f"draw {seed}": draw(seed, worlds=(2, 3, 4)) for seed in (5, 6, 7, 8, 9)} | {
    f"soak {seed}": draw(seed, worlds=(2, 3, 4, 6, 8)) for seed in range(1000, 1060)
}
REPEATED = ["gather, cp2 ep2", "overlap, vpp2 ep2", "cp2 pp2 vpp2", "tp2 pp2 vpp2 ep2"]


class Worlds:
    """The facts of cases; each world size is started once, for all cases of it together."""

    def __init__(self, cases: dict[str, Case], folder: Path) -> None:
        references = {f"reference {c.reference}": c.reference for c in cases.values()}
        self.cases = cases | references
        self.folder = folder
        self.failures: dict[int, str] = {}  # by world size; "" when all went well

    def facts(self, name: str) -> Facts:
        one = self.cases[name]
        if one.world not in self.failures:
            self.failures[one.world] = self._start(one.world)
        try:
            return read_facts(self.folder, name, one)
        except FileNotFoundError:
            raise AssertionError(f"no facts of {one}: {self.failures[one.world]}") from None

    def reference(self, name: str) -> Facts:
        return self.facts(f"reference {self.cases[name].reference}")

    def _start(self, world: int) -> str:
        cases = {name: asdict(c) for name, c in self.cases.items() if c.world == world}
        arguments: dict[str, Any] = {"cases": cases, "folder": str(self.folder)}
        module = "tests.distributed.layouts"
        try:
            run_ranks(module, "train_all", world=world, timeout_s=1500, **arguments)
        except AssertionError as error:
            return str(error)
        return ""


@pytest.fixture(scope="module")
def worlds(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    """Of the cases that this run of pytest selected."""
    specs = [getattr(item, "callspec", None) for item in request.session.items]
    names = {spec.params["name"] for spec in specs if spec and "name" in spec.params}
    cases = {n: one for n, one in (MATRIX | DRAWN | SOAKED).items() if n in names}
    return Worlds(cases, tmp_path_factory.mktemp("layouts"))


@pytest.fixture(scope="module")
def again(tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    return Worlds({n: MATRIX[n] for n in REPEATED}, tmp_path_factory.mktemp("again"))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.soak) if n in COSTLY else n for n in MATRIX]
)
def test_layout_trains_as_a_single_process(name: str, worlds: Worlds) -> None:
    reference = worlds.reference(name)
    assert reference.margin > NEAR_TIE, "experts nearly tie; give the case a batch of another seed"
    found = deviations(worlds.facts(name), reference)
    assert {k: v for k, v in found.items() if v > RELATIVE} == {}, MATRIX[name]


@pytest.mark.parametrize(
    "name", [*DRAWN, *(pytest.param(name, marks=pytest.mark.soak) for name in SOAKED)]
)
def test_random_layout_trains_as_a_single_process(name: str, worlds: Worlds) -> None:
    """Repeat a failing one by its Case, which the failure prints."""
    mine, reference = worlds.facts(name), worlds.reference(name)
    if reference.margin <= NEAR_TIE:
        pytest.skip(f"two experts tie to {reference.margin:.0e}: rounding may choose between them")
    found = deviations(mine, reference)
    assert {k: v for k, v in found.items() if v > RELATIVE} == {}, worlds.cases[name]


@pytest.mark.parametrize("name", REPEATED)
def test_layout_repeats_itself_bit_for_bit(name: str, worlds: Worlds, again: Worlds) -> None:
    """In fresh processes, everything but the time it took."""
    first, second = worlds.facts(name), again.facts(name)
    for facts in (*first.ranks, *second.ranks):
        for step in facts["steps"]:
            del step["learner/tokens_per_s"]
    assert first.ranks == second.ranks
    assert first.weights.keys() == second.weights.keys()
    for tensor, weights in first.weights.items():
        assert torch.equal(weights, second.weights[tensor]), tensor
