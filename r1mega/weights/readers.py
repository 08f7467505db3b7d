"""One way to read weights, whatever folder they are in: Hugging Face names, regions, few bytes."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from torch import Tensor

from r1mega.config import schema
from r1mega.weights.names import Region
from r1mega.weights.slices import SliceReader, StoredTensor
from r1mega.weights.torch_dist import TorchDistReader
from r1mega.weights.torch_dist_file import METADATA


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
    return (folder / METADATA).exists()


@contextmanager
def open_reader(folder: Path, network: schema.Model | None = None) -> Iterator[Reader]:
    """Of a Hugging Face folder, a checkpoint of ours or a torch_dist folder, which holds
    ``network``."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "is not there"
        raise ValueError(f"{folder} {what}: name a folder that holds weights")
    if not is_torch_dist(folder):
        with SliceReader(folder) as reader:
            yield reader
    elif network is None:
        raise ValueError(
            f"{folder} is a torch_dist folder, which does not say what network it holds: name a "
            "folder with its config.json by hf=FOLDER"
        )
    else:
        yield TorchDistReader(folder, network)
