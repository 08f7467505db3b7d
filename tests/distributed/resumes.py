"""Runs that continue under one layout after the other, each time from a checkpoint.

The hops of a run share its folder, and all runs of a call share processes: those whose rank is not
in a hop's world wait for the next one.
"""

import json
import os
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from tests.distributed import tiny
from tests.distributed.layouts import BATCH, BIAS_RATE, LR, SETTINGS, joined

MTP_WEIGHT = 0.3


@dataclass(frozen=True, kw_only=True, slots=True)
class Hop:
    """Continue with ``steps`` updates under a layout, and save."""

    world: int = 1
    axes: dict[str, Any] = field(default_factory=dict)  # sizes of Layout
    learner: dict[str, Any] = field(default_factory=dict)  # keys of schema.Learner
    steps: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What is trained, and its hops."""

    hops: list[Hop]
    network: str = "deepseek_v3"  # of tiny.MODELS
    model: dict[str, Any] = field(default_factory=dict)  # keys of schema.Model
    mtp: bool = False


def run_all(runs: dict[str, dict[str, Any]], folder: str) -> None:
    """Runs on every rank: each of ``runs`` (Run as JSON, by name) in a folder of its name.

    Its metrics.json has the metrics of every step, its weights.safetensors the last weights.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = timedelta(seconds=900)  # of those that wait for their hop
    store = dist.TCPStore(host, port, world, is_master=rank == 0, timeout=timeout)
    for name, values in runs.items():
        hops = [Hop(**hop) for hop in values.pop("hops")]
        one = Run(hops=hops, **values)
        metrics: list[dict[str, float]] = []
        for number, hop in enumerate(hops):
            store.set(f"{name}/{number}/{rank}", "here")
            store.wait([f"{name}/{number}/{r}" for r in range(world)], timeout)
            if rank >= hop.world:
                continue
            with joined(dist.PrefixStore(f"{name}/{number}", store), rank, hop.world):
                metrics += _hop(one, hop, Path(folder) / name, last=number == len(hops) - 1)
        if rank == 0:
            (Path(folder) / name / "metrics.json").write_text(json.dumps(metrics))


def _hop(run: Run, hop: Hop, folder: Path, *, last: bool) -> list[dict[str, float]]:
    from r1mega.algorithms import sft

    worker = _open(run, hop, folder)
    progress, _ = worker.load()
    vocab_size = worker.learner.weights.model.vocab_size
    sequences = tiny.random_batch(**BATCH, vocab_size=vocab_size).sequences
    metrics = []
    generator = torch.get_rng_state()
    with worker.until_saved():
        for _ in range(hop.steps):
            metrics.append(sft.step(list(sequences), learner=worker.learner, lr=LR))
        assert torch.equal(torch.get_rng_state(), generator), "an update drew random numbers"
        worker.save(replace(progress, step=progress.step + 1), None)
    if last:
        _refuses_halves(worker)
        weights = {n: t.clone() for n, t in worker.learner.hf_tensors() if t is not None}
        if worker.groups.rank == 0:
            save_file(weights, folder / "weights.safetensors")
    return metrics


def _refuses_halves(worker: Any) -> None:
    """Masters that the precision-aware optimizer keeps in 16 bits beside those of the weights."""
    from r1mega.learner.optimizer import load_optimizer_state

    def read(parameter: Any, span: tuple[int, int]) -> dict[str, torch.Tensor]:
        return {"param": torch.zeros(span[1] - span[0], dtype=torch.int16)}

    with pytest.raises(ValueError, match="saved in two halves by the precision-aware optimizer"):
        load_optimizer_state(worker.learner.optimizer, worker.learner.chunks, read)


def _open(run: Run, hop: Hop, folder: Path) -> Any:
    """A worker as the stages have it; a step of its checkpoints is a hop."""
    from r1mega.config import Config, network, schema
    from r1mega.parallel.backend import open_backend
    from r1mega.parallel.collectives import job_store
    from r1mega.parallel.groups import open_groups
    from r1mega.parallel.layout import Layout
    from r1mega.run.directory import RunDirectory
    from r1mega.stages.worker import Worker
    from r1mega.weights.checkpoints.saving import Saver

    backend = open_backend("cpu")
    layout = Layout(world=hop.world, **hop.axes)
    groups = open_groups(layout, backend, timeout_s=120, seed=1)
    model = replace(tiny.MODELS[run.network], **run.model)
    learner = tiny.tiny_learner(
        model=model,
        settings=replace(
            SETTINGS,
            expert_bias_update_rate=0.0 if network.is_dense(model) else BIAS_RATE,
            mtp_loss_weight=MTP_WEIGHT if run.mtp else 0.0,
            **hop.learner,
        ),
        groups=groups,
        mtp="joint" if run.mtp else "none",
    )
    directory = RunDirectory.create(folder.parent, folder.name)
    saver = Saver(
        directory.checkpoints,
        learner.weights,
        companions={"config.json": b"{}"},
        keep_last=99,
        groups=groups,
        store=job_store(),
        device=backend.device,
    )
    return Worker(
        config=Config(stage=schema.Stage(kind="sft")),
        backend=backend,
        groups=groups,
        directory=directory,
        learner=learner,
        saver=saver,
        writer=None,
    )
