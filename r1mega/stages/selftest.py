"""Does this layout train as one process does, and does the engine compute as the learner does?

``r1mega selftest`` runs this on every learner rank, with the user's configuration in small. Rank 0
trains one step by itself first, then all ranks together; then an engine with the published weights
draws samples that the learner scores again. Differences are relative to a tensor's largest entry.
"""

import math
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from r1mega.algorithms import grpo
from r1mega.algorithms.losses import next_token_loss
from r1mega.config import Config
from r1mega.data.prompts import load_prompts
from r1mega.data.tokenizer import load_tokenizer
from r1mega.learner.learner import Learner
from r1mega.learner.optimizer import show_gradients
from r1mega.learner.pipeline import Loss
from r1mega.parallel.backend import Backend
from r1mega.parallel.groups import alone
from r1mega.parallel.layout import Layout
from r1mega.records import Batch, Sequence
from r1mega.stages.generation import open_generation
from r1mega.stages.worker import Worker, open_policy, open_worker
from r1mega.system.stopwatch import Stopwatch

# Rounding: fp32 sums in another order (4e-6 was seen); in bf16 some tokens go to other experts too.
ALLOWED = {"fp32": 2e-5, "bf16": 0.1}
_NUM_SEQUENCES = 16
_BIAS = "e_score_correction_bias"  # moved by a rule of its own: it has no gradient

Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Of equally named tensors; ``first`` is the first, in their order, beyond ``allowed``."""

    what: str
    tensors: int
    largest: float
    allowed: float
    first: str | None = None
    difference: float = 0.0  # of the first

    def __str__(self) -> str:
        verdict = "ok"
        if self.first is not None:
            verdict = f"the first that differs is {self.first}, by {self.difference:.1e}"
        count = f"{self.tensors:>4} tensor{'' if self.tensors == 1 else 's'}"
        return (
            f"{self.what:<17} {count}, largest difference {self.largest:.1e} "
            f"(allowed {self.allowed:.0e}): {verdict}"
        )


def main(config: Config, backend: Backend) -> int:
    """The exit status; raises RuntimeError with the first tensor that differs."""
    expected = train_alone(config, backend) if os.environ["RANK"] == "0" else {}
    worker = open_worker(config, backend)
    found = train(worker.learner, config)
    comparisons = compare_training(expected, found, ALLOWED[config.learner.precision])
    layout = _name(worker.groups.layout)
    worker.say(f"one process against {layout}:")
    for comparison in comparisons:
        worker.say(f"  {comparison}")
    if config.stage.kind == "rl":
        comparisons.append(compare_engine(worker))
        worker.say(f"learner against engine:\n  {comparisons[-1]}")
    for comparison in comparisons:
        if comparison.first is not None:
            raise RuntimeError(f"selftest failed with {layout}: {comparison}")
    worker.say("selftest passed")
    return 0


def _name(layout: Layout) -> str:
    """``tp2 pp2 ep4``"""
    sizes = {axis: layout.size(axis) for axis in ("tp", "pp", "cp", "dp", "ep", "etp")}
    sizes["vpp"] = layout.vpp or 1
    return " ".join(f"{axis}{size}" for axis, size in sizes.items() if size > 1) or "one process"


def train_alone(config: Config, backend: Backend) -> dict[str, Tensors]:
    """What one process computes, before it joins the others."""
    plain = replace(config, learner=replace(config.learner, dispatcher="alltoall"))
    with alone(backend, seed=config.seed) as groups:
        return train(open_policy(plain, groups, backend), config)


def train(learner: Learner, config: Config) -> dict[str, Tensors]:
    """One step; what it computes by kind and name, whole tensors on rank 0 alone."""
    batch = random_batch(config.model.vocab_size, seed=config.seed)
    initial, rl = _whole(learner), config.stage.kind == "rl"
    loss: Loss = grpo.surrogate(config.algorithm) if rl else next_token_loss
    rows = zip(batch.sequences, learner.logprobs(batch), strict=True)
    logprobs = {s.uid: torch.tensor(row) for s, row in rows}
    metrics = learner.update(batch, loss, lr=config.learner.lr)
    updated = _whole(learner)
    held = learner.weights.copy_to_host()
    show_gradients(learner.optimizer, learner.chunks, adam_beta1=config.learner.adam_beta1)
    gradients = {name: g for name, g in _whole(learner).items() if not name.endswith(_BIAS)}
    learner.weights.swap(held)
    # Together, as the loss of GRPO may be anywhere near zero.
    numbers = torch.tensor([metrics["loss"], metrics["learner/grad_norm"]])
    return {
        "initial weights": initial,
        "log-probs": logprobs,
        "loss": {"loss and gradient norm": numbers},
        "gradients": gradients,
        "updated weights": updated,
    }


def _whole(learner: Learner) -> Tensors:
    """Every Hugging Face tensor in the order of a forward pass, on rank 0."""
    return {n: t.float().cpu() for n, t in learner.hf_tensors() if t is not None}


def random_batch(vocab_size: int, *, seed: int) -> Batch:
    """Sequences of 8 to 40 tokens with every column that a loss may read."""
    draw = random.Random(seed)

    def row(count: int) -> tuple[float, ...]:
        return tuple(draw.gauss(-math.log(vocab_size), 0.2) for _ in range(count))

    sequences = []
    for number in range(_NUM_SEQUENCES):
        length, start = draw.randint(8, 40), draw.randint(1, 5)
        count = length - start
        sequences.append(
            Sequence(
                uid=f"sequence {number}",
                token_ids=tuple(draw.randrange(vocab_size) for _ in range(length)),
                start=start,
                weight=1 / (_NUM_SEQUENCES * count),
                advantage=draw.gauss(0, 1),
                sampler_logprobs=row(count),
                policy_logprobs=row(count),
                reference_logprobs=row(count),
            )
        )
    return Batch(tuple(sequences))


def compare_engine(worker: Worker) -> Comparison:
    """Draw samples from an engine that holds the learner's weights, and score them again."""
    config, tokenizer = worker.config, load_tokenizer(worker.config.model.tokenizer)
    prompts = load_prompts(config.data, tokenizer, config.seed).train
    with open_generation(worker, Stopwatch(), (tokenizer.eos_token_id,)) as generation:
        generation.publish(1)
        chosen = prompts[: config.algorithm.prompts_per_step]
        groups = generation.draw(chosen, rollout=0, step=0).groups
    algorithm = config.algorithm
    batch = Batch(grpo.training_sequences(groups, algorithm), algorithm.replay_routing)
    learner = worker.learner.logprobs(batch)
    rows = list(zip(batch.sequences, learner, strict=True))
    return compare(
        "engine log-probs",
        {s.uid: torch.tensor(row) for s, row in rows},
        {s.uid: torch.tensor(s.sampler_logprobs) for s, _ in rows},
        ALLOWED[config.learner.precision],
    )


def compare_training(
    expected: Mapping[str, Tensors], found: Mapping[str, Tensors], allowed: float
) -> list[Comparison]:
    """Of each kind of tensor that ``expected`` has."""
    return [compare(what, expected[what], found[what], allowed) for what in expected]


def compare(what: str, expected: Tensors, found: Tensors, allowed: float) -> Comparison:
    """Every tensor of ``expected`` with its namesake, in order."""
    differences = {name: _difference(tensor, found.get(name)) for name, tensor in expected.items()}
    first = next((name for name, d in differences.items() if d > allowed), None)
    return Comparison(
        what=what,
        tensors=len(differences),
        largest=max(differences.values()),
        allowed=allowed,
        first=first,
        difference=0.0 if first is None else differences[first],
    )


def _difference(expected: Tensor, found: Tensor | None) -> float:
    """The largest, relative to the largest entry; infinite where they cannot be compared."""
    if found is None or found.shape != expected.shape:
        return math.inf
    difference = (found - expected).abs().max().item()
    if difference == 0:
        return 0.0
    relative = difference / max(expected.abs().max().item(), 1e-30)
    return relative if math.isfinite(relative) else math.inf
