"""What every learner rank opens first, and how a run is saved and continued."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from r1mega.config import Config
from r1mega.config.derived import mtp_mode, world_size
from r1mega.data.tokenizer import tokenizer_files
from r1mega.learner.learner import Learner, open_learner
from r1mega.learner.optimizer import load_optimizer_state, optimizer_state
from r1mega.learner.schedule import learning_rate
from r1mega.model.hf_config import generation_config, hf_config
from r1mega.parallel.backend import Backend
from r1mega.parallel.collectives import broadcast_record, gather_records, job_store
from r1mega.parallel.groups import Groups, open_groups
from r1mega.parallel.layout import Layout
from r1mega.run.directory import RunDirectory
from r1mega.run.metrics import MetricsWriter
from r1mega.run.samples import truncate_samples_after
from r1mega.stages.progress import say
from r1mega.system.termination import before_sigterm
from r1mega.weights.checkpoints import checkpoint
from r1mega.weights.checkpoints.checkpoint import Progress
from r1mega.weights.checkpoints.manifest import MANIFEST, CheckpointError, verify
from r1mega.weights.checkpoints.saved_optimizer import SavedOptimizer
from r1mega.weights.checkpoints.saving import Contents, Saver
from r1mega.weights.slices import SliceReader
from r1mega.weights.tensor_file import TensorFile

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Worker:
    """One rank of the learner. Only rank 0 has a metrics writer."""

    config: Config
    backend: Backend
    groups: Groups
    directory: RunDirectory
    learner: Learner
    saver: Saver
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
        """Start a checkpoint of everything a run needs to continue; training may go on at once."""
        contents = Contents(
            optimizer=optimizer_state(self.learner.optimizer, self.learner.chunks),
            rng=self.backend.rng_state(),
            reference=reference,
        )
        self.saver.save(progress, contents)

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
        return self._load(folder)

    @contextmanager
    def until_saved(self) -> Iterator[None]:
        """Whatever ends the block, also SIGTERM, first waits for a checkpoint on its way to disk.

        Raises CheckpointError where the last one could not be written.
        """
        with before_sigterm(self.saver.wind_down):
            try:
                yield
            except BaseException:
                self.saver.wind_down()
                raise
            self.saver.finish()
        if self.writer is not None:
            self.writer.close()

    def say(self, text: str) -> None:
        """A line for the person at the terminal, once."""
        if self.groups.rank == 0:
            say(text)

    def _newest(self) -> Path | None:
        checkpoints = self.directory.checkpoints
        folder, skipped = checkpoint.newest(
            saved_together(checkpoints, self.groups, self.backend),
            lambda folder: verify_together(folder, self.groups, self.backend),
        )
        if folder is None and skipped:
            reasons = "; ".join(skipped)
            raise CheckpointError(
                f"no checkpoint in {checkpoints} is whole ({reasons}): restore one, or start over "
                "under another name=..."
            )
        for reason in skipped if self.groups.rank == 0 else []:
            logger.warning("skipped a checkpoint: %s", reason)
        return folder

    def _load(self, folder: Path) -> tuple[Progress, list[Tensor] | None]:
        weights, learner = self.learner.weights, self.learner
        state = checkpoint.read_state(folder)
        checkpoint.check_resumable(folder, state, weights.model, weights.spec)
        reference = None
        if (folder / checkpoint.REFERENCE).exists():
            with SliceReader(folder / checkpoint.REFERENCE) as reader:
                weights.fill(reader.read)
            reference = weights.copy_to_host()
            self.saver.keep_reference(reference, folder)
        with SliceReader(folder) as reader:
            weights.fill(reader.read)
        with SavedOptimizer(folder, state, weights) as saved:
            if not saved.empty:
                load_optimizer_state(learner.optimizer, learner.chunks, saved.read)
        if state.layout == weights.layout:
            with TensorFile.open(folder / checkpoint.shard("rng", weights.rank)) as file:
                self.backend.set_rng_state({key: file.read(key) for key in file.entries})
        for notice in checkpoint.notices(state, weights.layout, weights.spec):
            self.say(notice)
        return state.progress, reference


def open_worker(config: Config, backend: Backend) -> Worker:
    """Join the job and build this rank's learner."""
    layout = Layout(world=world_size(config.cluster), **asdict(config.parallel))
    groups = open_groups(
        layout, backend, timeout_s=config.cluster.collective_timeout_s, seed=config.seed
    )
    directory = RunDirectory.create(config.run.root, config.name)
    init, checkpoints = Path(config.model.init), directory.checkpoints
    goes_on = config.run.resume and saved_together(checkpoints, groups, backend)
    if (init / MANIFEST).exists() and not goes_on:
        verify_together(init, groups, backend)
    learner = open_policy(config, groups, backend)
    return Worker(
        config=config,
        backend=backend,
        groups=groups,
        directory=directory,
        learner=learner,
        saver=Saver(
            checkpoints,
            learner.weights,
            companions=_companions(config) if groups.rank == 0 else {},
            keep_last=config.stage.keep_last,
            groups=groups,
            store=job_store(),
            device=backend.device,
        ),
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


def saved_together(checkpoints: Path, groups: Groups, backend: Backend) -> list[Path]:
    """``checkpoint.saved`` as rank 0 sees it: a network file system may show others the folder as
    it was some seconds ago, and ranks would go on from different checkpoints."""
    names = [folder.name for folder in checkpoint.saved(checkpoints)] if groups.rank == 0 else None
    told: list[str] = broadcast_record(
        names, list[str], source=0, group=groups.world, device=backend.device
    )
    return [checkpoints / name for name in told]


def verify_together(folder: Path, groups: Groups, backend: Backend) -> None:
    """``manifest.verify`` by all ranks, each a part of the files: large runs have terabytes."""
    error = ""
    try:
        verify(folder, part=groups.rank, parts=groups.world.size())
    except CheckpointError as failure:
        error = str(failure)
    errors = gather_records(error, str, group=groups.world, device=backend.device)
    if found := [text for text in errors if text]:
        raise CheckpointError(found[0])


def _companions(config: Config) -> dict[str, bytes]:
    """What a Hugging Face folder has beside its weights."""
    dtype = "float32" if config.learner.precision == "fp32" else "bfloat16"
    texts = {
        "config.json": hf_config(config.model, dtype=dtype),
        "generation_config.json": generation_config(config.model),
    }
    files = {name: f"{json.dumps(values, indent=2)}\n".encode() for name, values in texts.items()}
    return files | tokenizer_files(config.model.tokenizer)
