"""GRPO (DeepSeek-R1, arXiv 2501.12948, eq. 1-3): from scored groups to optimizer steps.

A rollout feeds ``num_steps`` optimizer steps. Advantages come from whole groups first; then the
samples are split at random into as many batches. Policy log-probs are frozen for the rollout.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import fmean

from torch import Tensor

from r1mega.algorithms.advantage import group_relative, token_weights
from r1mega.algorithms.losses import ClippedSurrogate
from r1mega.config.schema import Algorithm
from r1mega.learner.learner import Learner
from r1mega.records import Batch, Group, Sequence
from r1mega.system.stopwatch import Stopwatch


def train(
    groups: list[Group],
    *,
    learner: Learner,
    reference: list[Tensor] | None,
    algorithm: Algorithm,
    num_steps: int,
    learning_rates: Callable[[int], float],
    seed: str,
    watch: Stopwatch,
) -> Iterator[dict[str, float]]:
    """The optimizer steps one rollout feeds; yields the metrics of each as it is done.

    ``learning_rates(i)`` is the rate of the rollout's i-th step; ``reference`` a host copy of the
    reference policy's weights, or None without a KL term.
    """
    rollout = Batch(training_sequences(groups, algorithm), algorithm.replay_routing)
    with watch.phase("time/logprobs_s"):
        # A single step is the first after sampling: its ratio is 1 and needs no frozen log-probs.
        rollout = _frozen(rollout, learner, reference, freeze_policy=num_steps > 1)
    loss = surrogate(algorithm)
    for i, batch in enumerate(split(rollout, num_steps, algorithm.normalize, seed)):
        with watch.phase("time/update_s"):
            metrics = learner.update(batch, loss, lr=learning_rates(i))
        yield metrics | {"loss/samples": float(len(batch.sequences))}


def surrogate(algorithm: Algorithm) -> ClippedSurrogate:
    """The loss that the configuration describes."""
    return ClippedSurrogate(
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        kl_coef=algorithm.kl_coef,
        entropy_coef=algorithm.entropy_coef,
        ratio=algorithm.ratio,
        importance_cap=algorithm.importance_cap,
    )


def training_sequences(groups: list[Group], algorithm: Algorithm) -> tuple[Sequence, ...]:
    """Every usable sample with its group-relative advantage, ordered by group and index.

    A sample whose grading failed is left out of its group. ``drop_uniform_groups`` decides on the
    raw accuracy, not on the shaped reward; ``mask_overlong`` keeps truncated samples in the mean
    and standard deviation but not in the loss.
    """
    sequences: list[Sequence] = []
    for group in groups:
        graded = group.graded
        accuracies = {score.parts.get("accuracy", score.value) for _, score in graded}
        if not graded or (algorithm.drop_uniform_groups and len(accuracies) == 1):
            continue
        advantages = group_relative([score.value for _, score in graded])
        for (sample, _), advantage in zip(graded, advantages, strict=True):
            if algorithm.mask_overlong and sample.finish_reason == "length":
                continue
            sequences.append(
                Sequence(
                    uid=sample.uid,
                    token_ids=group.prompt.token_ids + sample.token_ids,
                    start=len(group.prompt.token_ids),
                    advantage=advantage,
                    sampler_logprobs=sample.sampler_logprobs,
                    routed_experts=sample.routed_experts,
                )
            )
    return tuple(sequences)


def split(rollout: Batch, num_batches: int, normalize: str, seed: str) -> list[Batch]:
    """A seeded random split into batches whose sizes differ by one at most, weights filled in."""
    order = list(range(len(rollout.sequences)))
    if num_batches > 1:
        random.Random(seed).shuffle(order)
    batches = []
    for i in range(num_batches):
        chosen = sorted(order[len(order) * i // num_batches : len(order) * (i + 1) // num_batches])
        part = [rollout.sequences[j] for j in chosen]
        weights = token_weights([s.num_targets for s in part], normalize)
        weighted = tuple(replace(s, weight=w) for s, w in zip(part, weights, strict=True))
        batches.append(replace(rollout, sequences=weighted))
    return batches


def rollout_metrics(groups: list[Group]) -> dict[str, float]:
    """Lengths (tokens), truncation and how many groups say something."""
    lengths = [len(sample.token_ids) for group in groups for sample in group.samples]
    cut = [s.finish_reason == "length" for group in groups for s in group.samples]
    uniform = [len({score.value for score in group.scores}) == 1 for group in groups]
    return {
        "response/length_mean": fmean(lengths),
        "response/length_max": float(max(lengths)),
        "response/truncated": fmean(cut),
        "prompt/length_mean": fmean(len(group.prompt.token_ids) for group in groups),
        "advantage/uniform": fmean(uniform),
    }


def _frozen(
    batch: Batch, learner: Learner, reference: list[Tensor] | None, *, freeze_policy: bool
) -> Batch:
    """The batch with policy and reference log-probs, as far as the loss needs them."""
    sequences = batch.sequences
    if freeze_policy:
        rows = learner.logprobs(batch)
        pairs = zip(sequences, rows, strict=True)
        sequences = tuple(replace(s, policy_logprobs=row) for s, row in pairs)
    if reference is not None:
        rows = learner.reference_logprobs(batch, reference)
        pairs = zip(sequences, rows, strict=True)
        sequences = tuple(replace(s, reference_logprobs=row) for s, row in pairs)
    return replace(batch, sequences=sequences)
