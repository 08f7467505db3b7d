"""Megatron's own distributed checkpoints hold what we say they hold, in both directions."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from r1mega.config import schema
from r1mega.parallel.layout import Layout
from r1mega.weights.inspection import check_whole
from r1mega.weights.local import random_region
from r1mega.weights.readers import open_reader
from r1mega.weights.regions import whole
from r1mega.weights.slices import SliceReader
from r1mega.weights.torch_dist.export import export
from tests.distributed.launch import run_ranks
from tests.distributed.tiny import MODEL, MODELS
from tests.unit.weights.weight_folders import random_weights, write_checkpoint

NETWORKS = {"v3": replace(MODEL, num_nextn_predict_layers=1), "tied": MODELS["qwen2 tied"]}


def check_megatron(folder: str, ours: str) -> dict[str, Any]:
    """On each of tp2 ranks: save with Megatron, load what was exported from ``ours``."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    from r1mega.weights.local import initialize
    from tests.distributed.tiny import tiny_learner

    groups, found = None, {}
    for name, model in NETWORKS.items():
        mtp = "joint" if model.num_nextn_predict_layers else "none"
        learner = tiny_learner(model=model, groups=groups, mtp=mtp, tp=2)
        groups = learner.groups
        chunk = learner.chunks[0]
        while isinstance(inner := getattr(chunk, "module", None), torch.nn.Module):
            chunk = inner
        theirs = Path(folder) / name
        if groups.rank == 0:
            theirs.mkdir()
            theirs.with_name(f"{name}_single").mkdir()
        dist.barrier()
        dist_checkpointing.save(_sharded(chunk), str(theirs))
        dist_checkpointing.save(_sharded(chunk, singleton_local_shards=True), f"{theirs}_single")
        loaded = dist_checkpointing.load(_sharded(chunk), str(Path(ours) / name))
        chunk.load_state_dict(loaded["model"])
        held = [tensor.clone() for tensor in learner.weights.tensors[0].values()]
        initialize(learner.weights, str(Path(ours) / f"{name}_checkpoint"), seed=0)
        expected = learner.weights.tensors[0].values()
        found[name] = [torch.equal(a, b) for a, b in zip(held, expected, strict=True)]
    return found


def _sharded(chunk: Any, **metadata: bool) -> dict[str, Any]:
    """Made anew for each use: Megatron changes it."""
    metadata |= {"dp_cp_group": chunk.pg_collection.dp_cp}
    return {"model": chunk.sharded_state_dict(metadata=metadata)}


def test_megatron_saves_what_we_read_and_loads_what_we_export(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    theirs.mkdir()
    for name, model in NETWORKS.items():
        _export(ours, name, model)
    for found in run_ranks(
        __name__, "check_megatron", world=2, folder=str(theirs), ours=str(ours), timeout_s=120
    ):
        assert found.keys() == NETWORKS.keys()
        for name, equal in found.items():
            assert len(equal) > 20, name
            assert all(equal), name
    for name, model in NETWORKS.items():
        _check_saved_by_megatron(theirs / name, model)
        _check_saved_by_megatron(theirs / f"{name}_single", model)


def _export(folder: Path, name: str, model: schema.Model) -> None:
    weights = {n: v.float() for n, v in random_weights(model, mtp=name == "v3").items()}
    cut = Layout(world=4, tp=2, pp=2, ep=2 if name == "v3" else 1)
    source = write_checkpoint(folder / f"{name}_checkpoint", model, weights, cut)
    with SliceReader(source) as reader:
        export(reader, model, folder / name, fused_norms=False)


def _check_saved_by_megatron(folder: Path, model: schema.Model) -> None:
    """A tiny learner begins with ``random_region(7)``."""
    draw = random_region(7, model.initializer_range)
    with open_reader(folder, model) as reader:
        check_whole(reader, model)
        for name, stored in reader.tensors.items():
            region = whole(stored.shape)
            values = reader.read(name, stored.shape, region)
            assert torch.equal(values, draw(name, stored.shape, region)), name
