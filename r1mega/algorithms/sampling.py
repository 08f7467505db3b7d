"""Prompts to scored groups, over all data-parallel leaders together.

Every leader draws and scores its share of the samples; a group may straddle leaders. Afterwards all
ranks hold all groups, in request order, however many leaders there were; only the routed experts of
a sample are on the leader that drew it alone.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count

import torch

from r1mega.parallel.collectives import gather_records, wait_for_all
from r1mega.parallel.groups import Groups
from r1mega.records import Group, Prompt, Sample, SampleRequest, Sampling, Score
from r1mega.rollout.sampler import HttpSampler, SamplingFailed
from r1mega.system.stopwatch import Stopwatch

logger = logging.getLogger(__name__)

ScorePairs = Callable[[list[tuple[Prompt, Sample]]], list[Score]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """The groups of a rollout and how drawing them went (``rollout/*`` metrics, summed)."""

    groups: list[Group]
    metrics: dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What one rank drew: nothing unless it leads a data-parallel replica."""

    samples: list[Sample]
    scores: list[Score]
    metrics: dict[str, float]
    error: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawer:
    """Draws groups; leaders have a sampler and a reward, the other ranks None."""

    groups: Groups
    device: torch.device
    sampler: HttpSampler | None
    reward: ScorePairs | None
    watch: Stopwatch
    calls: Iterator[int] = field(default_factory=count)

    def __call__(
        self, prompts: list[Prompt], group_size: int, sampling: Sampling, *, seed: str
    ) -> Drawn:
        """``group_size`` samples of every prompt; equal seeds draw equal samples.

        Raises SamplingFailed on all ranks when one leader could not draw.
        """
        requests = [
            SampleRequest(prompt=prompt, index=index, seed=sample_seed(seed, slot, index))
            for slot, prompt in enumerate(prompts)
            for index in range(group_size)
        ]
        mine = self._draw_share(requests, sampling)
        wait_for_all(f"draw {next(self.calls)}")  # a rollout may outlast a collective's timeout
        sent = replace(mine, samples=[replace(s, routed_experts=None) for s in mine.samples])
        shares = gather_records(sent, Share, group=self.groups.world, device=self.device)
        shares[self.groups.rank] = mine  # expert ids stay where they were drawn: they are large
        if errors := [share.error for share in shares if share.error]:
            raise SamplingFailed(errors[0])
        samples = [sample for share in shares for sample in share.samples]
        scores = [score for share in shares for score in share.scores]
        return Drawn(
            groups=[
                Group(
                    prompt=prompt,
                    samples=tuple(samples[slot * group_size : (slot + 1) * group_size]),
                    scores=tuple(scores[slot * group_size : (slot + 1) * group_size]),
                )
                for slot, prompt in enumerate(prompts)
            ],
            metrics=_add([share.metrics for share in shares]),
        )

    def _draw_share(self, requests: list[SampleRequest], sampling: Sampling) -> Share:
        if self.sampler is None or self.reward is None:
            return Share(samples=[], scores=[], metrics={})
        mine = share(requests, self.groups.place["dp"], self.groups.layout.dp)
        try:
            with self.watch.phase("time/rollout_s"):
                samples = self.sampler(mine, sampling)
        except SamplingFailed as error:
            return Share(samples=[], scores=[], metrics={}, error=str(error))
        with self.watch.phase("time/reward_s"):
            scores = self.reward([(r.prompt, s) for r, s in zip(mine, samples, strict=True)])
        stats = self.sampler.stats()
        return Share(
            samples=samples,
            scores=scores,
            metrics={
                "rollout/tokens_per_s": stats.response_tokens / max(stats.seconds, 1e-9),
                "rollout/retries": float(stats.retries),
                "rollout/stale": float(stats.stale),
            },
        )


def share(requests: list[SampleRequest], dp_rank: int, dp_size: int) -> list[SampleRequest]:
    """A leader's contiguous part: shares differ by one request at most."""
    bounds = [len(requests) * rank // dp_size for rank in (dp_rank, dp_rank + 1)]
    return requests[bounds[0] : bounds[1]]


def sample_seed(seed: str, slot: int, index: int) -> int:
    """Non-negative and below 2**62: a function of the run, the rollout and the place in it."""
    digest = hashlib.sha256(f"{seed}/{slot}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 2


def _add(rows: list[dict[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for row in rows:
        for name, value in row.items():
            total[name] = total.get(name, 0.0) + value
    return total
