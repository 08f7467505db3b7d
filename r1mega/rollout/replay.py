"""Kept rollouts: one file per rollout, one group per line; reading gives back equal records."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from r1mega.records import Group
from r1mega.system import files


def rollout_path(folder: Path, number: int) -> Path:
    return folder / f"rollout_{number:06d}.jsonl"


def write_rollout(folder: Path, number: int, groups: Sequence[Group]) -> Path:
    """Write rollout ``number`` whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = rollout_path(folder, number)
    files.write_atomically(path, b"".join(msgspec.json.encode(group) + b"\n" for group in groups))
    return path


def read_rollout(path: Path) -> list[Group]:
    """The groups of one kept rollout."""
    groups = []
    for number, value in files.read_json_lines(path):
        try:
            groups.append(msgspec.convert(value, Group))
        except msgspec.ValidationError as error:
            raise ValueError(f"{path}:{number}: expected a group of a rollout: {error}") from error
    return groups


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
