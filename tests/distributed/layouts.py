"""Training steps under one layout after another in the same processes, and how two runs compare.

A process that imports megatron costs seconds, a small layout less: so one world of ranks opens,
trains and closes all its layouts in turn. What was measured goes to files as soon as it is known; a
layout that fails takes only those behind it along.
"""

import gc
import hashlib
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

from r1mega.config import network
from r1mega.records import Batch, Sequence
from tests.distributed import tiny

RELATIVE = 1e-5
# Where the margin of a router's choice is smaller, rounding may choose: another layout would then
# train other experts, and rightly so. Nothing is compared there.
NEAR_TIE = 3e-6
# How a batch was packed and how long it took may differ.
VOLATILE = {"learner/microbatches", "learner/balance", "learner/tokens_per_s"}
LR = 3e-3
# Adam divides by the root of the second moment: after one step an entry moves by lr * g / (|g| +
# eps), which is lr * sign(g) wherever |g| >> eps. With the usual 1e-8 an entry whose gradient is
# rounding noise would move by a whole lr in either direction. Gradients here have a norm of about
# one and noise of 1e-9 to 1e-8: an epsilon of 1e-3 leaves the noise below 1e-5 of a step.
SETTINGS = replace(tiny.SETTINGS, lr=LR, adam_eps=1e-3, clip_grad=0.5)
BATCH = {"num_sequences": 8, "seed": 4}  # no two experts tie anywhere: see NEAR_TIE
BIAS_RATE = 1e-3  # padding that was counted would show in the expert bias


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What is trained (``network`` ... ``batch``) and how (``world`` ... ``shuffled``)."""

    world: int = 1
    axes: dict[str, Any] = field(default_factory=dict)  # sizes of Layout
    learner: dict[str, Any] = field(default_factory=dict)  # keys of schema.Learner
    shuffled: bool = False  # the sequences in another order
    network: str = "deepseek_v3"  # of tiny.MODELS
    model: dict[str, Any] = field(default_factory=dict)  # keys of schema.Model
    batch: dict[str, Any] = field(default_factory=lambda: dict(BATCH))  # of tiny.random_batch

    @property
    def reference(self) -> "Case":
        """The same training in a single process."""
        return Case(network=self.network, model=self.model, batch=self.batch)


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

    model = replace(tiny.MODELS[case.network], **case.model)
    bias_rate = 0.0 if network.is_dense(model) else BIAS_RATE
    learner = tiny.tiny_learner(
        model=model,
        settings=replace(SETTINGS, expert_bias_update_rate=bias_rate, **case.learner),
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

    margins = _watch_ties(learner.chunks) if case.world == 1 else []
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
    facts = {
        "logprobs": dict(zip(uids, logprobs, strict=True)),
        "steps": steps,
        "margin": min(margins, default=1.0),
    }
    return facts, weights


def _watch_ties(chunks: list[Any]) -> list[float]:
    """How near routers come to choosing other experts: a list that grows as they run.

    Shapes: T tokens, E experts, G groups of them.
    """
    margins: list[float] = []

    def note(router: Any, args: tuple[torch.Tensor], output: tuple[torch.Tensor, ...]) -> None:
        config = router.config
        scores_TE = router.gating(args[0]).sigmoid().flatten(0, 1) + router.expert_bias
        best_TG2 = scores_TE.unflatten(1, (config.moe_router_num_groups, -1)).topk(2).values
        ranked_TG = best_TG2.sum(-1).sort(-1, descending=True)
        num_chosen = config.moe_router_group_topk
        chosen_TG = ranked_TG.indices[:, :num_chosen]
        gaps = ranked_TG.values.diff()[:, num_chosen - 1 : num_chosen]
        allowed_TE = torch.zeros_like(best_TG2[..., 0]).scatter(1, chosen_TG, 1).bool()
        allowed_TE = allowed_TE.repeat_interleave(scores_TE.shape[1] // allowed_TE.shape[1], dim=1)
        used_TE = output[1]
        least = scores_TE.masked_fill(~used_TE, torch.inf).amin(-1)
        next_best = scores_TE.masked_fill(used_TE | ~allowed_TE, -torch.inf).amax(-1)
        margins.append((least - next_best).min().item())
        margins.append(-gaps.max().item() if gaps.numel() else 1.0)

    for chunk in chunks:
        for module in chunk.modules():
            if hasattr(module, "expert_bias"):
                module.register_forward_hook(note)
    return margins


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
    return Path(folder) / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.{ending}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What a case left behind."""

    ranks: list[dict[str, Any]]
    weights: dict[str, torch.Tensor]

    @property
    def margin(self) -> float:
        """By how much the nearest of all choices of experts was made; of a single process."""
        return float(self.ranks[0]["margin"])


def read_facts(folder: Path, name: str, case: Case) -> Facts:
    files = [_file(folder, name, f"{rank}.json") for rank in range(case.world)]
    return Facts(
        ranks=[json.loads(file.read_text()) for file in files],
        weights=load_file(_file(folder, name, "safetensors")),
    )


def deviations(mine: Facts, reference: Facts) -> dict[str, float]:
    """The largest difference of each kind, over all ranks.

    Log-probs: absolute. Metrics: relative, of values below 0.1 relative to that (a surrogate's
    terms cancel). Weights: relative to the largest entry of the tensor, or to what weights are
    drawn with where that is larger: biases start from zero and hold little but gradients yet.
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
            assert step.keys() == other.keys()
            for key in step.keys() - VOLATILE:
                scale = max(abs(other[key]), 0.1)
                note(f"step {number} {key}", abs(step[key] - other[key]) / scale)
    assert mine.weights.keys() == reference.weights.keys()
    for name, tensor in mine.weights.items():
        other = reference.weights[name]
        scale = max(other.abs().max().item(), tiny.MODEL.initializer_range)
        note(f"weights {name}", (tensor - other).abs().max().item() / scale)
    return worst
