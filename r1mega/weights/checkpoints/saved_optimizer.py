"""The optimizer's state in a checkpoint, for ranks of any layout: only the bytes they need.

Ranges are as their owners had them: ``<chunk>/<parameter>/range`` says which elements of the flat
parameter are under ``.../param``, ``.../exp_avg`` and ``.../exp_avg_sq``; ``.../step`` counts the
updates. Where several ranks hold a tensor, theirs are used together.
"""

from bisect import bisect_right
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from r1mega.weights.checkpoints.checkpoint import State, shard
from r1mega.weights.checkpoints.flat_ranges import Parameter, Place, places, sources, tensors
from r1mega.weights.checkpoints.manifest import CheckpointError
from r1mega.weights.local import LocalWeights
from r1mega.weights.tensor_file import DTYPES, TensorFile

ELEMENTS = ("param", "exp_avg", "exp_avg_sq")  # one value per element of the parameter
STEP = "step"
_RANGE = "/range"
_OPEN_FILES = 256  # of the thousands of a large run; systems allow 1,024


@dataclass(frozen=True, slots=True)
class _Source:
    """``rank`` saved the elements from ``begin`` on under ``key``; we use ``start`` to ``stop``."""

    start: int
    stop: int
    begin: int
    rank: int
    key: str


class SavedOptimizer:
    """Of ``folder``, seen by the rank that has ``weights``. Use as a context manager."""

    def __init__(self, folder: Path, state: State, weights: LocalWeights) -> None:
        self._folder = folder
        self._rank = weights.rank
        self._files: dict[int, tuple[TensorFile, ExitStack]] = {}
        self._ranges: dict[int, dict[str, tuple[int, int]]] = {}  # by rank, then by key
        self._tensors = tensors(weights.slices)
        names = {piece.hf_name for piece in weights.slices}
        self._places = places(state.model, state.layout, state.spec, names)
        self._covers: dict[int, list[_Source]] = {}  # by identity of the place

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for opened in self._files.values():
            opened[1].close()

    @property
    def empty(self) -> bool:
        """Whether it was saved before the first update, when there was nothing to keep."""
        return not self._file(0).entries

    def read(self, parameter: Parameter, span: tuple[int, int]) -> dict[str, torch.Tensor]:
        """Of elements ``span`` of the flat parameter: ``ELEMENTS`` in stored dtype, and ``STEP``.

        Raises CheckpointError where the checkpoint has none.
        """
        found: dict[str, torch.Tensor] = {}
        for place, run in sources(self._tensors[parameter], span, self._places):
            done = 0
            while done < run.length:
                at = run.start + done
                source = self._source(place, at)
                file = self._file(source.rank)
                length = min(run.length - done, source.stop - at)
                target = run.target + done
                for kind in ELEMENTS:
                    key = f"{source.key}/{kind}"
                    if kind not in found:
                        dtype = DTYPES[file.entries[key].dtype]
                        found[kind] = torch.empty(span[1] - span[0], dtype=dtype)
                    region = ((at - source.begin, at - source.begin + length),)
                    found[kind][target : target + length] = file.read(key, region)
                if STEP not in found:
                    found[STEP] = file.read(f"{source.key}/{STEP}")
                done += length
        return found

    def _source(self, place: Place, at: int) -> _Source:
        cover = self._cover(place)
        index = bisect_right(cover, at, key=lambda source: source.start) - 1
        if index < 0 or cover[index].stop <= at:
            raise CheckpointError(
                f"{self._folder} has no optimizer state for element {at} of a part of "
                f"{place.box.hf_name}: restore its optimizer files, or start a new run from its "
                f"weights with model.init={self._folder}"
            )
        return cover[index]

    def _cover(self, place: Place) -> list[_Source]:
        """Disjoint, in order; of replicas with the same ranges this rank's own come first."""
        if (known := self._covers.get(id(place))) is not None:
            return known
        spans = []
        for rank, (chunk, name) in place.holders:
            key = f"{chunk}/{name}"
            if (span := self._ranges_of(rank).get(key)) is not None:
                spans.append((span[0], rank != self._rank, rank, span[1], key))
        cover: list[_Source] = []
        end = 0
        for start, _, rank, stop, key in sorted(spans):
            if stop > end:
                cover.append(_Source(max(start, end), stop, start, rank, key))
                end = stop
        self._covers[id(place)] = cover
        return cover

    def _ranges_of(self, rank: int) -> dict[str, tuple[int, int]]:
        if rank not in self._ranges:
            file = self._file(rank)
            keys = [key for key in file.entries if key.endswith(_RANGE)]
            spans = {key.removesuffix(_RANGE): file.read(key).tolist() for key in keys}
            self._ranges[rank] = {key: (start, stop) for key, (start, stop) in spans.items()}
        return self._ranges[rank]

    def _file(self, rank: int) -> TensorFile:
        if rank not in self._files:
            if len(self._files) == _OPEN_FILES:  # the one that was opened first
                self._files.pop(next(iter(self._files)))[1].close()
            path, stack = self._folder / shard("optimizer", rank), ExitStack()
            try:
                file = stack.enter_context(TensorFile.open(path))
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
            self._files[rank] = file, stack
        return self._files[rank][0]
