"""What every learner rank opens first, and how a run is saved and continued."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from r1mega.config import Config
from r1mega.config.derived import mtp_mode, world_size
from r1mega.learner.learner import Learner, open_learner
from r1mega.learner.optimizer import load_optimizer_state, optimizer_state
from r1mega.learner.schedule import learning_rate
from r1mega.parallel.backend import Backend
from r1mega.parallel.collectives import gather_records
from r1mega.parallel.groups import Groups, open_groups
from r1mega.parallel.layout import Layout
from r1mega.run.directory import RunDirectory
from r1mega.run.metrics import MetricsWriter
from r1mega.run.samples import truncate_samples_after
from r1mega.stages.progress import say
from r1mega.weights import checkpoint
from r1mega.weights.checkpoint import CheckpointError, Progress
from r1mega.weights.slices import SliceReader

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Worker:
    """One rank of the learner. Only rank 0 has a metrics writer."""

    config: Config
    backend: Backend
    groups: Groups
    directory: RunDirectory
    learner: Learner
    writer: MetricsWriter | None

    def learning_rate(self, step: int) -> float:
        settings = self.config.learner
        return learning_rate(
            step,
            lr=settings.lr,
            min_lr=settings.min_lr,
            warmup_steps=settings.warmup_steps,
            total_steps=self.config.stage.steps,
            schedule=settings.lr_schedule,
        )

    def write(self, step: int, metrics: dict[str, float]) -> None:
        if self.writer is not None:
            self.writer.write(step, metrics)

    def save(self, progress: Progress, reference: list[Tensor] | None) -> None:
        """A checkpoint of everything a run needs to continue bit for bit."""
        folder = checkpoint.save(
            self.directory.checkpoints,
            progress,
            weights=self.learner.weights,
            reference=reference,
            optimizer=optimizer_state(self.learner.optimizer, self.learner.chunks),
            rng=self.backend.rng_state(),
            groups=self.groups,
            device=self.backend.device,
        )
        if self.groups.rank == 0:
            checkpoint.prune(folder, self.config.stage.keep_last)
            logger.info("saved %s", folder)

    def resume(self) -> tuple[Progress, list[Tensor] | None]:
        """Continue from the newest whole checkpoint, and forget what was recorded after it."""
        progress, reference = self.load()
        if self.writer is not None:
            self.writer.truncate_after(progress.step)
            truncate_samples_after(self.directory, progress.step)
        return progress, reference

    def load(self) -> tuple[Progress, list[Tensor] | None]:
        """The newest whole checkpoint of this run, or step 0 of a new one.

        Returns where the run stands and a host copy of the reference policy when one was saved.
        """
        folder = self._newest() if self.config.run.resume else None
        if folder is None:
            return Progress(step=0, data_position=0), None
        self.say(f"loading {folder}")
        return checkpoint.read_progress(folder), self._load(folder)

    def close(self) -> None:
        """After the last step."""
        if self.writer is not None:
            self.writer.close()

    def say(self, text: str) -> None:
        """A line for the person at the terminal, once."""
        if self.groups.rank == 0:
            say(text)

    def _newest(self) -> Path | None:
        checkpoints = self.directory.checkpoints
        folder, skipped = checkpoint.newest(checkpoints, self._verify)
        if folder is None and skipped:
            reasons = "; ".join(skipped)
            raise CheckpointError(
                f"no checkpoint in {checkpoints} is whole ({reasons}): restore one, or start over "
                "under another name=..."
            )
        for reason in skipped if self.groups.rank == 0 else []:
            logger.warning("skipped a checkpoint: %s", reason)
        return folder

    def _verify(self, folder: Path) -> None:
        """Each rank reads its part of the files: on a large run they are terabytes."""
        groups, error = self.groups, ""
        try:
            checkpoint.verify(folder, part=groups.rank, parts=groups.world.size())
        except CheckpointError as failure:
            error = str(failure)
        errors = gather_records(error, str, group=groups.world, device=self.backend.device)
        if found := [text for text in errors if text]:
            raise CheckpointError(found[0])

    def _load(self, folder: Path) -> list[Tensor] | None:
        weights, rank = self.learner.weights, self.groups.rank
        checkpoint.check_resumable(folder, weights.model, weights.layout)
        reference = None
        if (folder / checkpoint.REFERENCE).exists():
            with SliceReader(folder / checkpoint.REFERENCE) as reader:
                weights.fill(reader.read)
            reference = weights.copy_to_host()
        with SliceReader(folder) as reader:
            weights.fill(reader.read)
        load_optimizer_state(
            self.learner.optimizer,
            self.learner.chunks,
            checkpoint.load_rank_tensors(folder, "optimizer", rank),
        )
        self.backend.set_rng_state(checkpoint.load_rank_tensors(folder, "rng", rank))
        return reference


def open_worker(config: Config, backend: Backend) -> Worker:
    """Join the job and build this rank's learner."""
    layout = Layout(world=world_size(config.cluster), **asdict(config.parallel))
    groups = open_groups(
        layout, backend, timeout_s=config.cluster.collective_timeout_s, seed=config.seed
    )
    directory = RunDirectory.create(config.run.root, config.name)
    return Worker(
        config=config,
        backend=backend,
        groups=groups,
        directory=directory,
        learner=open_policy(config, groups, backend),
        writer=MetricsWriter(directory, config.run.wandb_project) if groups.rank == 0 else None,
    )


def open_policy(config: Config, groups: Groups, backend: Backend) -> Learner:
    """The learner of this stage on this rank."""
    return open_learner(
        config.model,
        config.learner,
        groups,
        backend,
        temperature=config.rollout.temperature if config.stage.kind == "rl" else 1.0,
        seed=config.seed,
        mtp=mtp_mode(config.learner, config.stage),
    )
