"""One way to read weights, whatever folder they are in: Hugging Face names, regions, few bytes."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from torch import Tensor

from r1mega.config import schema
from r1mega.model.hf_config import model_from_hf
from r1mega.weights.checkpoints.checkpoint import COMPANIONS, STATE, read_state
from r1mega.weights.regions import Region
from r1mega.weights.slices import SliceReader, StoredTensor


class Reader(Protocol):
    """Any number of threads may share one. What it cannot read it refuses with a ValueError."""

    @property
    def folder(self) -> Path: ...

    @property
    def tensors(self) -> Mapping[str, StoredTensor]: ...

    def read(self, name: str, shape: tuple[int, ...], region: Region) -> Tensor:
        """``name[region]`` as the numbers it stands for; ``shape`` is what the model expects."""

    def read_stored(self, name: str, region: Region) -> Tensor:
        """``name[region]`` as it is stored."""


def is_torch_dist(folder: Path) -> bool:
    """Does Megatron's or torch's distributed checkpoint lie here?"""
    return (folder / ".metadata").exists()


def read_network(folder: Path, described_in: Path | None = None) -> schema.Model:
    """The network that a folder of weights holds: a checkpoint's state.json, or a config.json, that
    of ``described_in`` for torch_dist weights if given. Raises ValueError."""
    where = described_in if described_in is not None and is_torch_dist(folder) else folder
    check_folder(where)
    if (where / STATE).exists():
        return read_state(where).model
    path = where / "config.json"
    if not path.exists():
        path = where / COMPANIONS / "config.json"
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise ValueError("it is no object")
        ends = values.get("eos_token_id")  # some models have several: weights do not depend on it
        end = ends[0] if ends and isinstance(ends, list) else ends
        return model_from_hf(values | {"eos_token_id": end})
    except FileNotFoundError:
        if steps := [*where.glob("step_*"), *where.glob("checkpoints/step_*")]:
            raise ValueError(f"{where} holds checkpoints: name one, as {max(steps)}") from None
        raise ValueError(
            f"{where} has no config.json to say what network it holds: put its model's there"
        ) from None
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} does not describe a network: {error}") from error


@contextmanager
def open_reader(folder: Path, network: schema.Model) -> Iterator[Reader]:
    """Of a Hugging Face folder, a checkpoint of ours or a torch_dist folder, of ``network``."""
    check_folder(folder)
    if is_torch_dist(folder):
        # Here, because torch's own reader costs everyone who imports it a second and 50 MB.
        from r1mega.weights.torch_dist.reader import TorchDistReader

        yield TorchDistReader(folder, network)
        return
    with SliceReader(folder) as reader:
        yield reader


def check_folder(folder: Path) -> None:
    """Raises ValueError with what is wrong with the path itself."""
    try:
        empty = not any(folder.iterdir())
    except OSError as error:  # missing, a file, links that lead back to themselves, no permission
        raise ValueError(f"{folder}: {error.strerror}; name a folder that holds weights") from error
    if empty:
        raise ValueError(f"{folder} is empty: name a folder that holds weights")


def check_outside(out: Path, source: Path) -> None:
    """Raises ValueError when ``out`` would lie in ``source``, and perish with it."""
    if out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{out} is inside {source}, which is only read: name a folder elsewhere")
