"""The worker's side of the rollout fleet: draw scored groups, publish weights."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from r1mega.algorithms.sampling import Drawer, Drawn
from r1mega.config.derived import max_response_tokens
from r1mega.model.routing import routers
from r1mega.parallel.collectives import broadcast_record, wait_for_all
from r1mega.parallel.groups import Groups
from r1mega.records import Prompt, Sampling
from r1mega.rewards.compose import compose
from r1mega.rollout.fleet import Fleet
from r1mega.rollout.publish import Publisher
from r1mega.rollout.replay import (
    read_rollout,
    read_routed_experts,
    rollout_numbers,
    rollout_path,
    with_routed_experts,
)
from r1mega.rollout.router import read_router
from r1mega.rollout.sampler import HttpSampler, SamplingFailed
from r1mega.stages.publishing import open_publisher
from r1mega.stages.worker import Worker
from r1mega.system.stopwatch import Stopwatch

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class Generation:
    """Rank 0 steers the fleet, data-parallel leaders sample and score; the rest take part."""

    worker: Worker
    drawer: Drawer
    fleet: Fleet | None
    publisher: Publisher
    stop_token_ids: tuple[int, ...]
    version: int = 0  # last published

    def draw(self, prompts: list[Prompt], *, rollout: int, step: int) -> Drawn:
        """The groups that train ``step`` and those after it in this rollout."""
        config = self.worker.config
        sampling = Sampling(
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            top_k=config.rollout.top_k,
            max_tokens=max_response_tokens(config.rollout, step),
            stop_token_ids=self.stop_token_ids,
            routers=routers(config.model) if config.algorithm.replay_routing else None,
        )
        seed = f"{config.seed}/rollout/{rollout}"
        return self._draw(prompts, config.algorithm.group_size, sampling, seed)

    def draw_for_evaluation(self, prompts: list[Prompt], *, step: int) -> Drawn:
        """``stage.eval_samples`` responses of every prompt: the same seeds at every evaluation."""
        config = self.worker.config
        sampling = Sampling(
            temperature=config.stage.eval_temperature,
            top_p=config.stage.eval_top_p,
            max_tokens=max_response_tokens(config.rollout, step),
            stop_token_ids=self.stop_token_ids,
        )
        seed = f"{config.seed}/evaluation"
        return self._draw(prompts, config.stage.eval_samples, sampling, seed)

    def _draw(self, prompts: list[Prompt], count: int, sampling: Sampling, seed: str) -> Drawn:
        """Again from the start, with weights published anew, when all that held them are gone.

        It ends: each time costs every engine one of its ``rollout.max_restarts``.
        """
        while True:
            try:
                return self.drawer(prompts, count, sampling, seed=seed)
            except SamplingFailed as error:  # on all ranks alike
                if not self._weights_are_lost():
                    raise
                logger.warning("no engine holds the weights any more; publishing again: %s", error)
            self.publish(self.version)

    def _weights_are_lost(self) -> bool:
        worker, fleet = self.worker, self.fleet
        return broadcast_record(
            fleet is not None and not fleet.holding(self.version),
            bool,
            source=0,
            group=worker.groups.world,
            device=worker.backend.device,
        )

    def publish(self, version: int) -> dict[str, float]:
        """Send the policy to every engine as ``version``; from then on only it is accepted."""
        report = self.publisher.publish(version)
        self.version = version
        if self.drawer.sampler is not None:
            self.drawer.sampler.expected_version = version
        return {
            "sync/bytes": float(report.bytes),
            "sync/minimum_bytes": float(report.minimum_bytes),
            "sync/p2p_bytes": float(report.point_to_point_bytes),
            "sync/engines": float(len(report.engines)),
            "sync/verified": float(report.verified),
            "sync/probe_difference": report.probe_difference,
            "sync/probe_seconds": report.probe_seconds,
            "sync/seconds": report.seconds,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """Kept rollouts in place of engines: trains on what was drawn before, publishes to nobody."""

    folder: Path
    numbers: tuple[int, ...]
    groups: Groups
    replays_routing: bool

    @classmethod
    def open(cls, folder: str, groups: Groups, *, replays_routing: bool) -> "Replay":
        return cls(
            folder=Path(folder),
            numbers=tuple(rollout_numbers(Path(folder))),
            groups=groups,
            replays_routing=replays_routing,
        )

    def draw(self, prompts: list[Prompt], *, rollout: int, step: int) -> Drawn:
        """The kept rollout ``rollout``; they start over when there are fewer than asked for."""
        path = rollout_path(self.folder, self.numbers[rollout % len(self.numbers)])
        kept = read_rollout(path)
        if self.replays_routing and self.groups.is_dp_leader:  # as drawn: each leader has a part
            experts = read_routed_experts(path, self.groups.place["dp"], self.groups.layout.dp)
            kept = with_routed_experts(kept, experts)
        return Drawn(groups=kept, metrics={})

    def draw_for_evaluation(self, prompts: list[Prompt], *, step: int) -> None:
        """Nothing can be drawn."""

    def publish(self, version: int) -> dict[str, float]:
        """There is nobody to send to."""
        return {}


@contextmanager
def open_generation(
    worker: Worker, watch: Stopwatch, stop_token_ids: tuple[int, ...]
) -> Iterator[Generation]:
    """Connect to the engines that the launcher started; ends the reward's workers at exit."""
    config, groups = worker.config, worker.groups
    rollout = config.rollout
    router = read_router(worker.directory.fleet)
    sampler = reward = fleet = None
    if groups.is_dp_leader:
        sampler = HttpSampler(
            url=router.url,
            concurrency=rollout.concurrency,
            timeout_s=rollout.request_timeout_s,
            max_retries=rollout.max_retries,
        )
        reward = compose(config.rewards)
    if groups.rank == 0:
        fleet = Fleet(worker.directory.fleet, router, logs=worker.directory.logs)
        # The launcher registers engines as they come up; the first publish wants all of them.
        fleet.wait_ready(rollout.engines, rollout.engine_start_timeout_s)
    wait_for_all("engines are there")  # loading SGLang may outlast a collective's timeout
    publisher = open_publisher(worker, fleet)
    try:
        yield Generation(
            worker=worker,
            drawer=Drawer(
                groups=groups,
                device=worker.backend.device,
                sampler=sampler,
                reward=reward,
                watch=watch,
            ),
            fleet=fleet,
            publisher=publisher,
            stop_token_ids=stop_token_ids,
        )
    finally:
        if reward is not None:
            reward.close()
        publisher.close()
