"""Supervised training: next-token loss over documents or responses."""

from dataclasses import replace

from r1mega.algorithms.advantage import token_weights
from r1mega.algorithms.losses import next_token_loss
from r1mega.learner.learner import Learner
from r1mega.records import Batch, Sequence


def step(sequences: list[Sequence], *, learner: Learner, lr: float) -> dict[str, float]:
    """One optimizer step: the mean over all target tokens of the batch."""
    weights = token_weights([s.num_targets for s in sequences], "token")
    batch = Batch(tuple(replace(s, weight=w) for s, w in zip(sequences, weights, strict=True)))
    return learner.update(batch, next_token_loss, lr=lr)
