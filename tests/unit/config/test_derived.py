"""Derived quantities against numbers worked out by hand and the layout's own arithmetic."""

from pathlib import Path

import pytest

from r1mega.config import Parallel, Rollout, derived, load
from r1mega.parallel.layout import stage_layers

CONFIGS = Path(__file__).parents[3] / "configs"
R1_671B = [
    str(CONFIGS / name)
    for name in ("stage/r1_zero.yaml", "model/deepseek_v3.yaml", "cluster/h100x256.yaml")
]


def test_the_671b_run_in_numbers() -> None:
    config = load(R1_671B)
    assert derived.world_size(config.cluster) == 192
    assert derived.data_parallel_size(config.cluster, config.parallel) == 2
    assert derived.expert_data_parallel_size(config.cluster, config.parallel) == 1
    assert derived.layers_per_stage(61, config.parallel) == (6, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5)
    assert derived.samples_per_step(config.algorithm) == 512
    assert derived.samples_per_rollout(config.algorithm, config.rollout) == 8192
    assert derived.num_rollouts(config.stage, config.rollout) == 650
    assert derived.num_nodes(config.cluster) * config.cluster.gpus_per_node == 256
    assert derived.engine_gpus(config.cluster, config.rollout) == 64
    assert derived.longest_sequence_tokens(config.data, config.rollout) == 66_560


def test_the_response_limit_switches_at_its_step() -> None:
    config = load(R1_671B[:2])
    limits = [derived.max_response_tokens(config.rollout, step) for step in (0, 8199, 8200, 10399)]
    assert limits == [32_768, 32_768, 65_536, 65_536]
    assert derived.max_response_tokens(Rollout(max_response_tokens=7), 10**6) == 7


def test_a_last_rollout_may_feed_fewer_steps() -> None:
    config = load(["stage.steps=10", "rollout.steps=4"])
    assert derived.num_rollouts(config.stage, config.rollout) == 3


@pytest.mark.parametrize(
    ("layers", "pp", "first", "last", "expected"),
    [
        (61, 4, None, 13, (16, 16, 16, 13)),
        (61, 16, 3, 2, (3, *[4] * 14, 2)),
        (61, 8, 7, 6, (7, *[8] * 6, 6)),
        (4, 2, 1, 3, (1, 3)),
        (4, 1, None, None, (4,)),
    ],
)
def test_uneven_stages_as_the_layout_places_them(
    layers: int, pp: int, first: int | None, last: int | None, expected: tuple[int, ...]
) -> None:
    parallel = Parallel(pp=pp, layers_in_first_stage=first, layers_in_last_stage=last)
    assert derived.layers_per_stage(layers, parallel) == expected
    placed = stage_layers(layers, pp, first=first, last=last)
    assert tuple(sum(len(chunk) for chunk in stage) for stage in placed) == expected


@pytest.mark.parametrize(
    ("num_layers", "pp", "spread"),
    [
        (61, 4, (16, 15, 15, 15)),
        (61, 8, (7, *(8,) * 6, 6)),
        (61, 16, (3, *(4,) * 14, 2)),
        (61, 60, (2, *(1,) * 59)),
        (61, 1, (61,)),
        (7, 2, (4, 3)),
        (8, 4, (2, 2, 2, 2)),
    ],
)
def test_stages_as_even_as_can_be(num_layers: int, pp: int, spread: tuple[int, ...]) -> None:
    first, last = derived.even_stages(num_layers, pp)
    assert derived.spread_layers(num_layers, pp, first, last) == spread


def test_any_number_of_stages_up_to_the_layers_can_be_spread() -> None:
    for num_layers in range(1, 70):
        for pp in range(1, num_layers + 1):
            sizes = derived.spread_layers(num_layers, pp, *derived.even_stages(num_layers, pp))
            assert (len(sizes), sum(sizes)) == (pp, num_layers)
            assert min(sizes) >= 1
    with pytest.raises(ValueError, match="pp=3 must be at most num_hidden_layers=2"):
        derived.even_stages(2, 3)
