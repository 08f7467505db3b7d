"""Kept rollouts: one file per rollout, one group per line; reading gives back equal records.

Routed experts are too large for JSON and for one rank: each rank that drew samples keeps theirs in
a file of msgpack beside the rollout's, {place of the sample in the rollout: experts}.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

import msgspec

from r1mega.records import Group, RoutedExperts
from r1mega.system import files


def rollout_path(folder: Path, number: int) -> Path:
    return folder / f"rollout_{number:06d}.jsonl"


def write_rollout(folder: Path, number: int, groups: Sequence[Group]) -> Path:
    """Write rollout ``number``, but its routed experts, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = rollout_path(folder, number)
    plain = with_routed_experts(groups, {})
    files.write_atomically(path, b"".join(msgspec.json.encode(group) + b"\n" for group in plain))
    return path


def write_routed_experts(folder: Path, number: int, rank: int, groups: Sequence[Group]) -> None:
    """Keep those of ``groups`` that this rank has; without any it writes nothing."""
    samples = [sample for group in groups for sample in group.samples]
    held = {i: s.routed_experts for i, s in enumerate(samples) if s.routed_experts is not None}
    if held:
        folder.mkdir(parents=True, exist_ok=True)
        path = rollout_path(folder, number).with_suffix(f".experts-{rank:05d}.msgpack")
        files.write_atomically(path, msgspec.msgpack.encode(held))


def read_routed_experts(path: Path, part: int, parts: int) -> dict[int, RoutedExperts]:
    """This reader's part of what was kept beside the rollout at ``path``."""
    held: dict[int, RoutedExperts] = {}
    for kept in sorted(path.parent.glob(f"{path.stem}.experts-*.msgpack"))[part::parts]:
        try:
            held |= msgspec.msgpack.decode(kept.read_bytes(), type=dict[int, RoutedExperts])
        except msgspec.DecodeError as error:
            raise ValueError(f"{kept} is damaged: {error}; keep this rollout anew") from error
    return held


def with_routed_experts(groups: Sequence[Group], experts: dict[int, RoutedExperts]) -> list[Group]:
    """The groups whose samples have these experts, by place in the rollout, and no others."""
    places = count()
    return [
        replace(
            group,
            samples=tuple(
                replace(sample, routed_experts=experts.get(next(places)))
                for sample in group.samples
            ),
        )
        for group in groups
    ]


def read_rollout(path: Path) -> list[Group]:
    """The groups of one kept rollout."""
    groups = []
    for number, value in files.read_json_lines(path):
        try:
            groups.append(msgspec.convert(value, Group))
        except msgspec.ValidationError as error:
            raise ValueError(f"{path}:{number}: expected a group of a rollout: {error}") from error
    return groups


def forget_rollouts(folder: Path, first: int) -> None:
    """Remove rollout ``first`` and later ones: an earlier launch kept them, they are drawn anew."""
    for path in folder.glob("rollout_*"):
        if int(path.name.removeprefix("rollout_").partition(".")[0]) >= first:
            path.unlink()


def rollout_numbers(folder: Path) -> list[int]:
    """Which rollouts ``folder`` holds, in order."""
    numbers = sorted(
        int(path.stem.removeprefix("rollout_")) for path in folder.glob("rollout_*.jsonl")
    )
    if not numbers:
        raise ValueError(
            f"{folder} holds no rollout_NNNNNN.jsonl; keep some with stage.only=rollout"
        )
    return numbers
