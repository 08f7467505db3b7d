"""A safetensors file in host memory: live tensors are copied into it, then it is written.

Header and tensors lie as they will lie on disk, so writing is one stream of large blocks for any
number of tensors, and the file is digested on the way. Copying, writing and digesting release the
interpreter's lock.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from r1mega.weights.checkpoints.manifest import FileRecord
from r1mega.weights.tensor_file import DTYPE_NAMES, DTYPES, digest_tensor, plan, write_file

Shapes = dict[str, tuple[str, tuple[int, ...]]]  # dtype (safetensors' name) and shape by key


@dataclass(frozen=True, slots=True)
class Part:
    """What one file is to hold: live tensors, and the shape that each has there."""

    tensors: Mapping[str, Tensor]
    shapes: Shapes

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Part":
        """In the shapes they have."""
        return cls(tensors, {k: (DTYPE_NAMES[t.dtype], tuple(t.shape)) for k, t in tensors.items()})

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


class HostFile:
    """Of tensors of ``shapes``; ``pinned``: in page-locked memory, for copies from a GPU."""

    def __init__(self, shapes: Shapes, *, pinned: bool) -> None:
        self.shapes = shapes
        # Wide elements first: then every tensor is aligned.
        widest_first = sorted(shapes.items(), key=lambda item: -DTYPES[item[1][0]].itemsize)
        self._header, self._entries = plan(dict(widest_first))
        size = sum(entry.nbytes for entry in self._entries.values())
        self._body_B = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)

    @property
    def num_bytes(self) -> int:
        return len(self._header) + self._body_B.numel()

    def __getitem__(self, key: str) -> Tensor:
        """The place of a tensor: what is copied to it will be in the file."""
        entry = self._entries[key]
        start = entry.start - len(self._header)
        flat = self._body_B[start : start + entry.nbytes]
        return flat.view(DTYPES[entry.dtype]).view(entry.shape)

    @torch.no_grad()
    def copy(self, part: Part) -> None:
        """Take over the values; from a GPU they are here once its stream is done."""
        for key, values in part.tensors.items():
            self[key].view(values.shape).copy_(values, non_blocking=True)

    def digests(self) -> list[str]:
        """``digest_tensor`` of every tensor, in the order of ``shapes``."""
        return [digest_tensor(self[key]) for key in self.shapes]

    def write(self, path: Path) -> FileRecord:
        """Returns when all of it is on disk; raises OSError."""
        return FileRecord(self.num_bytes, write_file(path, self._header, self._body_B))
