"""Training steps under one layout after another in the same processes, and how two runs compare.

A process that imports megatron costs seconds, a small layout less: so one world of ranks opens,
trains and closes all its layouts in turn. What was measured goes to files as soon as it is known; a
layout that fails takes only those behind it along.
"""

import gc
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from r1mega.records import Batch, Sequence
from tests.distributed import tiny

RELATIVE = 1e-5
# How a batch was packed and how long it took may differ.
VOLATILE = {"learner/microbatches", "learner/balance", "learner/tokens_per_s"}
LR = 1e-2
# Adam divides by the root of the second moment: after one step an entry moves by lr * g / (|g| +
# eps), which is lr * sign(g) wherever |g| >> eps. With the usual 1e-8 an entry whose gradient is
# rounding noise would move by a whole lr in either direction. Gradients here have a norm of about
# one and noise of 1e-9 to 1e-8: an epsilon of 1e-3 leaves the noise below 1e-5 of a step.
SETTINGS = replace(tiny.SETTINGS, lr=LR, adam_eps=1e-3, clip_grad=0.5, expert_bias_update_rate=1e-3)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What is trained (``model``, ``batch``) and how (``axes``, ``learner``, ``shuffled``)."""

    world: int = 1
    axes: dict[str, Any] = field(default_factory=dict)  # sizes of Layout
    learner: dict[str, Any] = field(default_factory=dict)  # keys of schema.Learner
    shuffled: bool = False  # the sequences in another order
    model: dict[str, Any] = field(default_factory=dict)  # keys of schema.Model
    batch: dict[str, Any] = field(default_factory=dict)  # arguments of tiny.random_batch

    @property
    def reference(self) -> "Case":
        """The same training in a single process."""
        return Case(model=self.model, batch=self.batch)


def train_all(cases: dict[str, dict[str, Any]], folder: str) -> None:
    """Runs on every rank: train ``cases`` (Case as JSON, by name) and leave their facts on disk."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, world, is_master=rank == 0)
    for name, values in cases.items():
        with joined(dist.PrefixStore(name, store), rank, world):
            facts, weights = _train(Case(**values))
        if rank == 0:
            save_file(weights, _file(folder, name, "safetensors"))
        _file(folder, name, f"{rank}.json").write_text(json.dumps(facts))


@contextmanager
def joined(store: dist.Store, rank: int, world: int) -> Iterator[None]:
    """A process group of its own, closed with all that Megatron made of it."""
    from r1mega.parallel.backend import open_backend

    open_backend("cpu")
    from megatron.core import parallel_state  # after the backend's shim

    timeout = timedelta(seconds=120)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    gc.collect()  # gloo closes the connections of a group with the last reference to it


def _train(case: Case) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Log-probs, then two steps of GRPO and two of SFT: metrics of each, weights after each two."""
    from r1mega.algorithms import sft
    from r1mega.algorithms.losses import ClippedSurrogate

    learner = tiny.tiny_learner(
        model=replace(tiny.MODEL, **case.model),
        settings=replace(SETTINGS, **case.learner),
        temperature=0.8,
        **case.axes,
    )
    batch = tiny.random_batch(**case.batch)
    if case.shuffled:
        batch = Batch(batch.sequences[::-1])
    weights: dict[str, torch.Tensor] = {}

    def keep(stage: str) -> None:
        for name, tensor in learner.hf_tensors():
            if tensor is not None:
                weights[f"{stage}/{name}"] = tensor.contiguous().clone()

    logprobs = learner.logprobs(batch)
    sequences = [_near(s, row) for s, row in zip(batch.sequences, logprobs, strict=True)]
    steps = []
    for ratio in ("sequence", "token"):
        loss = ClippedSurrogate(
            clip_low=0.2, clip_high=0.2, kl_coef=0.1, ratio=ratio, importance_cap=1.02
        )
        steps.append(learner.update(Batch(tuple(sequences)), loss, lr=LR))
    keep("grpo")
    for _ in range(2):
        steps.append(sft.step(sequences, learner=learner, lr=LR))
    keep("sft")
    uids = [s.uid for s in batch.sequences]
    return {"logprobs": dict(zip(uids, logprobs, strict=True)), "steps": steps}, weights


def _near(sequence: Sequence, logprobs: list[float]) -> Sequence:
    """The sequence with columns as a rollout leaves them: all near the policy's own log-probs."""
    g = torch.Generator().manual_seed(zlib.crc32(sequence.uid.encode()))

    def beside(std: float) -> tuple[float, ...]:
        noise = torch.randn(len(logprobs), generator=g).tolist()
        return tuple(p + std * x for p, x in zip(logprobs, noise, strict=True))

    return replace(
        sequence,
        sampler_logprobs=beside(0.03),
        policy_logprobs=beside(0.03),
        reference_logprobs=beside(0.2),
    )


def _file(folder: str | Path, name: str, ending: str) -> Path:
    return Path(folder) / f"{name.replace(' ', '_').replace('/', '_')}.{ending}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What a case left behind."""

    ranks: list[dict[str, Any]]
    weights: dict[str, torch.Tensor]


def read_facts(folder: Path, name: str, case: Case) -> Facts:
    files = [_file(folder, name, f"{rank}.json") for rank in range(case.world)]
    return Facts(
        ranks=[json.loads(file.read_text()) for file in files],
        weights=load_file(_file(folder, name, "safetensors")),
    )


def deviations(mine: Facts, reference: Facts) -> dict[str, float]:
    """The largest difference of each kind, over all ranks.

    Log-probs: absolute. Metrics: relative, of values below 0.1 relative to that (a surrogate's
    terms cancel). Weights: relative to the largest entry of the tensor.
    """
    expected = reference.ranks[0]
    worst: dict[str, float] = {}

    def note(kind: str, deviation: float) -> None:
        worst[kind] = max(worst.get(kind, 0.0), deviation)

    for facts in mine.ranks:
        assert facts["logprobs"].keys() == expected["logprobs"].keys()
        for uid, row in facts["logprobs"].items():
            pairs = zip(row, expected["logprobs"][uid], strict=True)
            note("log-probs", max(abs(a - b) for a, b in pairs))
        for number, (step, other) in enumerate(zip(facts["steps"], expected["steps"], strict=True)):
            for key in step.keys() - VOLATILE:
                scale = max(abs(other[key]), 0.1)
                note(f"step {number} {key}", abs(step[key] - other[key]) / scale)
    assert mine.weights.keys() == reference.weights.keys()
    for name, tensor in mine.weights.items():
        other = reference.weights[name]
        note(f"weights {name}", ((tensor - other).abs().max() / other.abs().max()).item())
    return worst
