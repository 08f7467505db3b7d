"""Reinforcement learning (``r1mega rl``), on every learner rank: draw, train, publish, repeat."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor

from r1mega.algorithms import grpo
from r1mega.config import Config
from r1mega.data.prompts import PromptSet, load_prompts, order
from r1mega.data.tokenizer import load_tokenizer
from r1mega.parallel.backend import Backend
from r1mega.records import Group
from r1mega.rewards.compose import check_errors, reward_metrics
from r1mega.rollout.replay import forget_rollouts, write_rollout, write_routed_experts
from r1mega.run.samples import write_samples
from r1mega.stages import report
from r1mega.stages.evaluate import evaluation_metrics
from r1mega.stages.generation import Generation, Replay, open_generation
from r1mega.stages.progress import progress_bar
from r1mega.stages.worker import Worker, open_worker
from r1mega.system.stopwatch import Stopwatch
from r1mega.weights.checkpoints.checkpoint import Progress

logger = logging.getLogger(__name__)


def main(config: Config, backend: Backend) -> int:
    """GRPO until ``stage.steps``; the exit status."""
    tokenizer = load_tokenizer(config.model.tokenizer)
    prompts = load_prompts(config.data, tokenizer, config.seed)
    worker = open_worker(config, backend)
    progress, reference = worker.resume()
    if worker.groups.rank == 0 and _keeps(config) and config.rollout.replay is None:
        forget_rollouts(worker.directory.rollouts, progress.rollout)
    if reference is None and config.algorithm.kl_coef:
        if progress.step:
            worker.say(f"no reference policy was saved: from here on it is step {progress.step}'s")
        reference = worker.learner.weights.copy_to_host()
    watch = Stopwatch()
    steps = config.stage.steps
    with (
        worker.until_saved(),
        _open_source(worker, watch, (tokenizer.eos_token_id,)) as source,
        progress_bar("rl", steps, progress.step, shown=worker.groups.rank == 0) as advance,
    ):
        source.publish(progress.version)
        if progress.step == 0 and config.stage.eval_every:
            worker.write(0, _evaluate(worker, source, prompts, step=0))
        while progress.step < steps:
            before = progress.step
            with watch.phase("time/step_s"):
                progress, reference, row = _rollout(
                    worker, source, prompts, progress, reference, watch
                )
            row |= watch.lap()
            if config.stage.eval_every and _due(config.stage.eval_every, progress.step, steps):
                with watch.phase("time/eval_s"):
                    row |= _evaluate(worker, source, prompts, step=progress.step)
                row["time/eval_s"] = watch.lap()["time/eval_s"]
            worker.write(progress.step, row)
            advance(progress.step - before, _note(row))
            if config.stage.save_every >= 0 and _due(config.stage.save_every, progress.step, steps):
                worker.save(progress, reference)
    if worker.groups.rank == 0:
        report.close(worker.directory)
    return 0


def _rollout(
    worker: Worker,
    source: Generation | Replay,
    prompts: PromptSet,
    progress: Progress,
    reference: list[Tensor] | None,
    watch: Stopwatch,
) -> tuple[Progress, list[Tensor] | None, dict[str, float]]:
    """One rollout and the optimizer steps it feeds; the last step's metrics are still to be
    written."""
    config = worker.config
    algorithm, stage = config.algorithm, config.stage
    num_steps = min(config.rollout.steps, stage.steps - progress.step)
    count = algorithm.prompts_per_step * num_steps
    chosen = order(len(prompts.train), config.seed, progress.data_position, count)
    drawn = source.draw(
        [prompts.train[i] for i in chosen], rollout=progress.rollout, step=progress.step
    )
    row = {"version": float(progress.version)} | drawn.metrics
    row |= _group_metrics(drawn.groups, config.rewards.max_error_fraction)
    _keep(worker, progress, drawn.groups)
    progress = replace(
        progress, data_position=progress.data_position + count, rollout=progress.rollout + 1
    )
    if stage.only == "rollout":
        return replace(progress, step=progress.step + num_steps), reference, row

    first = progress.step
    for metrics in grpo.train(
        drawn.groups,
        learner=worker.learner,
        reference=reference,
        algorithm=algorithm,
        num_steps=num_steps,
        learning_rates=lambda i: worker.learning_rate(first + i),
        seed=f"{config.seed}/split/{progress.rollout}",
        watch=watch,
    ):
        if progress.step > first:
            worker.write(progress.step, row)
            row = {}
        row |= metrics
        progress = replace(progress, step=progress.step + 1)
        refresh = algorithm.reference_refresh_steps
        if reference is not None and refresh and progress.step % refresh == 0:
            reference = worker.learner.weights.copy_to_host()
    progress = replace(progress, version=progress.version + 1)
    with watch.phase("time/sync_s"):
        row |= source.publish(progress.version)
    return progress, reference, row


@contextmanager
def _open_source(
    worker: Worker, watch: Stopwatch, stop_token_ids: tuple[int, ...]
) -> Iterator[Generation | Replay]:
    """Engines, or the kept rollouts that stand in for them."""
    config = worker.config
    if config.rollout.replay is not None:
        replays_routing = config.algorithm.replay_routing
        yield Replay.open(config.rollout.replay, worker.groups, replays_routing=replays_routing)
        return
    with open_generation(worker, watch, stop_token_ids) as generation:
        yield generation


def _evaluate(
    worker: Worker, source: Generation | Replay, prompts: PromptSet, *, step: int
) -> dict[str, float]:
    stage = worker.config.stage
    drawn = source.draw_for_evaluation(prompts.held_out[: stage.eval_prompts], step=step)
    if drawn is None:
        return {}
    return evaluation_metrics(drawn.groups, worker.config.rewards.max_error_fraction)


def _group_metrics(groups: list[Group], max_error_fraction: float) -> dict[str, float]:
    scores = [score for group in groups for score in group.scores]
    check_errors(scores, max_error_fraction)
    return reward_metrics(scores) | grpo.rollout_metrics(groups)


def _keep(worker: Worker, progress: Progress, groups: list[Group]) -> None:
    """Samples for people, and the whole rollout for replay when asked for."""
    config, rank, folder = worker.config, worker.groups.rank, worker.directory.rollouts
    if _keeps(config):
        write_routed_experts(folder, progress.rollout, rank, groups)
    if rank != 0:
        return
    write_samples(worker.directory, progress.step + 1, groups, config.run.sample_rows)
    if _keeps(config):
        logger.info("kept %s", write_rollout(folder, progress.rollout, groups))


def _keeps(config: Config) -> bool:
    return config.stage.keep_rollouts or config.stage.only == "rollout"


def _due(every: int, step: int, last: int) -> bool:
    """Every so many steps and at the end; with 0 only at the end."""
    return step == last or (every > 0 and step % every == 0)


def _note(row: dict[str, float]) -> str:
    accuracy = row.get("reward/accuracy", row.get("reward/mean", 0.0))
    return f"accuracy {accuracy:.2f}, {row.get('response/length_mean', 0.0):.0f} tokens"
