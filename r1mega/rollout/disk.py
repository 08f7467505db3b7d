"""Weights over a filesystem that learner and engines share: one Hugging Face folder per version.

Every learner rank writes rectangles of its own at their offsets, each distinct one by one rank: the
filesystem has to take writes of several nodes to one file (Lustre, GPFS, a local disk; NFS does not
promise it). A folder has its name only when it is whole, and goes when all engines hold the next.
"""

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from math import prod
from pathlib import Path

from torch import Tensor

from r1mega.parallel.collectives import Team
from r1mega.rollout.carrier import Carried, CarryFailed, post_all
from r1mega.rollout.fleet import EngineHandle
from r1mega.weights import fp8
from r1mega.weights.blocks import BLOCK, own_scale_region, scale_name, scale_shape
from r1mega.weights.checkpoints.manifest import partial_folder
from r1mega.weights.conversion.hf_folder import shard_index
from r1mega.weights.conversion.placing import Shapes, cut_by_size
from r1mega.weights.holders import balanced_owners
from r1mega.weights.local import LocalWeights, wire_dtype
from r1mega.weights.regions import Region, extent
from r1mega.weights.slices import HF_INDEX, StoredTensor
from r1mega.weights.tensor_file import DTYPE_NAMES, TensorFile, num_bytes

_SHARD_BYTES = 4 << 30


class Disk:
    """A ``Carrier``. Folders are made in ``folder``, with the files of ``companions``, which are
    config.json and the tokenizer."""

    def __init__(
        self,
        weights: LocalWeights,
        names: Sequence[str],
        *,
        folder: Path,
        companions: Path,
        team: Team,
        quantized: Collection[str] = (),
        ranks_per_engine: int = 1,
        timeout_s: float = 600.0,
    ) -> None:
        self._weights = weights
        self._folder = folder
        self._companions = companions
        self._team = team
        self._quantized = quantized
        self._ranks_per_engine = ranks_per_engine
        self._timeout_s = timeout_s
        self._tensors = cut_by_size(_shapes(weights, names, quantized), _SHARD_BYTES)
        self._mine = list(_own_regions(weights, names))

    def carry(self, engines: tuple[EngineHandle, ...], version: int) -> Carried:
        target = self._folder / f"version_{version:06d}"
        partial = partial_folder(target)
        self._together(lambda: self._create(partial))
        self._weights.settle()
        self._together(lambda: self._fill(partial))
        self._together(lambda: self._name(partial, target))
        if not self._team.is_root:
            return Carried()
        self._load(engines, target, version)
        for other in self._folder.iterdir():
            if other != target:
                shutil.rmtree(other, ignore_errors=True)
        size = sum(num_bytes(stored.dtype, stored.shape) for stored in self._tensors.values())
        return Carried(bytes=size * self._ranks_per_engine * len(engines))

    def abandon(self) -> None:
        """Engines have read what they hold, and another attempt writes anew."""
        if self._team.is_root:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _together(self, step: Callable[[], None]) -> None:
        """Returns when every rank has done it; raises CarryFailed on all when one could not."""
        error = ""
        try:
            step()
        except OSError as failure:
            error = f"the weights could not be written for the engines: {failure}"
        if errors := [text for text in self._team.gathered(error, str) if text]:
            raise CarryFailed({}, errors[0])

    def _create(self, partial: Path) -> None:
        if not self._team.is_root:
            return
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(self._companions, partial)
        for file, tensors in _by_file(self._tensors).items():
            entries = {name: (stored.dtype, stored.shape) for name, stored in tensors.items()}
            with TensorFile.create(partial / file, entries):
                pass
        (partial / HF_INDEX).write_bytes(shard_index(self._tensors))

    def _fill(self, partial: Path) -> None:
        with ExitStack() as stack:
            files: dict[str, TensorFile] = {}
            for name, region, values in self._values():
                file = self._tensors[name].pieces[0].file
                if file not in files:
                    opened = TensorFile.open(partial / file, writable=True)
                    files[file] = stack.enter_context(opened)
                files[file].write(name, region, values)

    def _values(self) -> Iterator[tuple[str, Region, Tensor]]:
        """What this rank writes, on the host."""
        mine = {(piece.hf_name, piece.region): piece for piece in self._weights.slices}
        for name, region in self._mine:
            values = self._weights.region(mine[name, region])
            if name not in self._quantized:
                yield name, region, values.cpu()
                continue
            if any(start % BLOCK for start, _ in region):
                raise ValueError(
                    f"this rank holds {name}{list(region)}, which does not begin with an FP8 block "
                    f"of {BLOCK}: use rollout.sync=broadcast or another layout"
                )
            codes, scales = fp8.quantize(values)
            yield name, region, codes.cpu()
            yield scale_name(name), own_scale_region(region), scales.cpu()

    def _name(self, partial: Path, target: Path) -> None:
        if self._team.is_root:
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)

    def _load(self, engines: tuple[EngineHandle, ...], target: Path, version: int) -> None:
        body = {
            "model_path": str(target.resolve()),
            "load_format": "auto",  # SGLang would else take that of its start
            "weight_version": str(version),
            "flush_cache": True,
        }
        post_all(engines, "/update_weights_from_disk", body, timeout_s=self._timeout_s)


def _own_regions(weights: LocalWeights, names: Sequence[str]) -> Iterator[tuple[str, Region]]:
    """Of every distinct rectangle one of its holders is the writer, evenly in elements."""
    held = {name: weights.holders[name] for name in names}
    owners = balanced_owners(held, lambda _, region: prod(extent(region)))
    for name in names:
        for (region, _), owner in zip(held[name].parts, owners[name], strict=True):
            if owner == weights.rank:
                yield name, region


def _shapes(weights: LocalWeights, names: Sequence[str], quantized: Collection[str]) -> Shapes:
    """Of every tensor of the folder."""
    shapes: Shapes = {}
    for name in names:
        shape = weights.holders[name].shape
        if name in quantized:
            shapes[name] = fp8.CODES, shape
            shapes[scale_name(name)] = fp8.SCALES, scale_shape(shape)
        else:
            shapes[name] = DTYPE_NAMES[wire_dtype(name, weights)], shape
    return shapes


def _by_file(tensors: Mapping[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    files: dict[str, dict[str, StoredTensor]] = {}
    for name, stored in tensors.items():
        files.setdefault(stored.pieces[0].file, {})[name] = stored
    return files
