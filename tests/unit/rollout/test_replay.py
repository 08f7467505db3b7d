"""Kept rollouts read back equal, and a bad line names its place."""

from pathlib import Path

import pytest

from r1mega.records import Group, RoutedExperts, Score
from r1mega.rollout.client import read_answer
from r1mega.rollout.replay import (
    forget_rollouts,
    read_rollout,
    read_routed_experts,
    rollout_numbers,
    rollout_path,
    with_routed_experts,
    write_rollout,
    write_routed_experts,
)
from tests.unit.rollout.answers import answer, request


def group(uid: str) -> Group:
    requests = [request(index, uid) for index in range(2)]
    logprobs = [[-0.1, 8, None], [-1e-30, 9, None], [-1 / 3, 1, None]]
    samples = tuple(read_answer(answer(output_token_logprobs=logprobs), r) for r in requests)
    scores = (Score(value=1.5, parts={"accuracy": 1.0}), Score(value=0.0, parts={}, error="x"))
    return Group(prompt=requests[0].prompt, samples=samples, scores=scores)


def test_round_trip(tmp_path: Path) -> None:
    groups = [group("a"), group("b/\u00e9\n")]
    path = write_rollout(tmp_path / "rollouts", 3, groups)
    assert path.name == "rollout_000003.jsonl"
    assert len(path.read_text().splitlines()) == 2
    assert read_rollout(path) == groups


def test_each_rank_keeps_the_experts_it_has(tmp_path: Path) -> None:
    """Two ranks drew a rollout of four samples; three readers share what they kept."""
    groups = [group("a"), group("b")]
    experts = {i: RoutedExperts(dtype="uint8", ids=bytes([i, 255])) for i in range(4)}
    for rank, places in enumerate([(0, 1), (2, 3), ()]):
        held = with_routed_experts(groups, {i: experts[i] for i in places})
        write_routed_experts(tmp_path, 3, rank, held)
    path = write_rollout(tmp_path, 3, with_routed_experts(groups, experts))
    assert read_rollout(path) == groups
    assert len(list(tmp_path.glob("rollout_000003.experts-*.msgpack"))) == 2
    parts = [read_routed_experts(path, part, 3) for part in range(3)]
    assert parts == [{0: experts[0], 1: experts[1]}, {2: experts[2], 3: experts[3]}, {}]
    read = with_routed_experts(read_rollout(path), parts[1])
    assert [s.routed_experts for g in read for s in g.samples] == [None, None, *parts[1].values()]
    assert rollout_numbers(tmp_path) == [3]


def test_a_cut_off_file_of_experts_is_named(tmp_path: Path) -> None:
    held = {0: RoutedExperts(dtype="uint8", ids=bytes(40))}
    write_routed_experts(tmp_path, 3, 0, with_routed_experts([group("a")], held))
    (kept,) = tmp_path.glob("*.msgpack")
    kept.write_bytes(kept.read_bytes()[:30])
    with pytest.raises(ValueError, match=r"rollout_000003.experts-00000.msgpack is damaged"):
        read_routed_experts(rollout_path(tmp_path, 3), 0, 1)


def test_what_is_drawn_anew_is_forgotten_first(tmp_path: Path) -> None:
    """Else a shorter second launch leaves rollouts of the first, and training reads them too."""
    held = {0: RoutedExperts(dtype="uint8", ids=b"12")}
    for number in range(3):
        write_rollout(tmp_path, number, [group("a")])
        write_routed_experts(tmp_path, number, 1, with_routed_experts([group("a")], held))
    forget_rollouts(tmp_path, 1)
    assert rollout_numbers(tmp_path) == [0]
    assert [path.name for path in tmp_path.glob("*.msgpack")] == [
        "rollout_000000.experts-00001.msgpack"
    ]


def test_numbers(tmp_path: Path) -> None:
    for number in (10, 2):
        write_rollout(tmp_path, number, [group("a")])
    assert rollout_numbers(tmp_path) == [2, 10]
    assert rollout_path(tmp_path, 2).exists()
    with pytest.raises(ValueError, match="holds no rollout_NNNNNN"):
        rollout_numbers(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "expected one JSON object per line"),
        ('{"prompt": 3}', "expected a group of a rollout: Expected `object`, got `int`"),
    ],
)
def test_bad_line_names_its_place(tmp_path: Path, line: str, message: str) -> None:
    path = write_rollout(tmp_path, 1, [group("a")])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=f"rollout_000001.jsonl:2: {message}"):
        read_rollout(path)
