"""Random small trainings under random layouts: whatever the configuration does not refuse."""

import random
from dataclasses import replace
from typing import Any

from r1mega.config import ConfigError, checks, network, schema
from tests.distributed import tiny
from tests.distributed.layouts import SETTINGS, Case


def draw(seed: int, worlds: tuple[int, ...]) -> Case:
    """The same case for the same arguments."""
    rng = random.Random(seed)
    while True:
        case = _propose(rng, rng.choice(worlds))
        if _is_valid(case):
            return case


def relaid(case: Case, rng: random.Random, worlds: tuple[int, ...]) -> Case:
    """The same training under another layout."""
    model = replace(tiny.MODELS[case.network], **case.model)
    while True:
        world = rng.choice(worlds)
        axes = _axes(rng, world, model.num_hidden_layers, network.is_dense(model))
        other = replace(case, world=world, axes=axes)
        if _is_valid(other):
            return other


def _is_valid(case: Case) -> bool:
    config = schema.Config(
        parallel=schema.Parallel(**case.axes),
        model=replace(tiny.MODELS[case.network], **case.model),
        learner=replace(SETTINGS, **case.learner),
        stage=schema.Stage(kind="sft"),
        cluster=schema.Cluster(learner_processes_per_node=case.world),
    )
    try:
        checks.check(config)
    except ConfigError:
        return False
    return True


def _propose(rng: random.Random, world: int) -> Case:
    name = rng.choice([*tiny.MODELS, *["deepseek_v3"] * 3])
    dense = network.is_dense(tiny.MODELS[name])
    model = _dense(rng) if dense else _mixture(rng)
    return Case(
        world=world,
        axes=_axes(rng, world, model["num_hidden_layers"], dense),
        learner=_learner(rng, dense),
        shuffled=rng.random() < 0.3,
        network=name,
        model=model,
        batch={
            "num_sequences": rng.choice([1, 2, 5, 9, 14]),
            "seed": rng.randrange(1000),
            "lengths": rng.choice([(2, 12), (8, 41), (2, 90)]),
            "vocab_size": model["vocab_size"],
        },
    )


def _axes(rng: random.Random, world: int, num_layers: int, dense: bool) -> dict[str, Any]:
    axes: dict[str, Any] = {}
    rest = world
    for axis in rng.sample(["tp", "pp", "cp"], 3):
        axes[axis] = _divisor(rng, rest)
        rest //= axes[axis]
    if not dense:
        axes["ep"] = _divisor(rng, world // axes["pp"])
        axes["etp"] = _divisor(rng, world // axes["pp"] // axes["ep"])
    if axes["pp"] > 1:
        if rng.random() < 0.5:
            axes["vpp"] = rng.choice([2, 2, 3])
        for end in ("first", "last"):
            if rng.random() < 0.2:
                axes[f"layers_in_{end}_stage"] = rng.randint(1, num_layers - 1)
    return axes


def _divisor(rng: random.Random, number: int) -> int:
    return rng.choice([size for size in range(1, number + 1) if number % size == 0])


def _learner(rng: random.Random, dense: bool) -> dict[str, Any]:
    learner: dict[str, Any] = {
        "overlap_grad_reduce": rng.random() < 0.5,
        "recompute": rng.choice(["none", "full", "selective"]),
        "tokens_per_microbatch": rng.choice([1, 16, 48, 128, 4096]),
        "logprob_chunk_tokens": rng.choice([1, 7, 64]),
    }
    modules = ["core_attn", "mlp"]
    if not dense:
        learner["dispatcher"] = rng.choice(["alltoall", "allgather"])
        modules += ["mla_up_proj", "moe", "shared_experts"]
    if learner["recompute"] == "selective":
        learner["recompute_modules"] = sorted(rng.sample(modules, rng.randint(1, 2)))
    return learner


def _dense(rng: random.Random) -> dict[str, Any]:
    heads = rng.choice([2, 4, 6, 8])
    return {
        "num_hidden_layers": rng.choice([2, 3, 4, 6, 8]),
        "num_attention_heads": heads,
        "hidden_size": rng.choice([24, 64]),
        "intermediate_size": rng.choice([48, 72]),
        "vocab_size": rng.choice([96, 120]),
        "num_key_value_heads": rng.choice([size for size in (1, 2, 4) if heads % size == 0]),
        "head_dim": 8,
    }


def _mixture(rng: random.Random) -> dict[str, Any]:
    groups = rng.choice([1, 2, 4])
    model: dict[str, Any] = {
        "num_hidden_layers": rng.choice([2, 3, 4, 6, 8]),
        "num_attention_heads": rng.choice([2, 4, 6, 8]),
        "hidden_size": rng.choice([24, 64]),
        "intermediate_size": rng.choice([48, 72]),
        "vocab_size": rng.choice([96, 120]),
        "first_k_dense_replace": rng.randint(0, 2),
        "moe_intermediate_size": rng.choice([16, 24]),
        "n_routed_experts": rng.choice([8, 12, 16]),
        "n_shared_experts": rng.choice([1, 2]),
        "n_group": groups,
        "topk_group": groups // 2 or 1,
        "num_experts_per_tok": groups // 2 * 2 or rng.choice([2, 3]),
    }
    return model if rng.random() < 0.5 else model | {"rope_scaling": None}
