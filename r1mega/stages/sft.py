"""Supervised fine-tuning and plain next-token training (``r1mega sft``), on every learner rank."""

from dataclasses import replace

from r1mega.algorithms import sft
from r1mega.config import Config
from r1mega.data.documents import load_documents
from r1mega.data.prompts import order
from r1mega.data.tokenizer import load_tokenizer
from r1mega.parallel.backend import Backend
from r1mega.stages.progress import progress_bar
from r1mega.stages.worker import open_worker
from r1mega.system.stopwatch import Stopwatch


def main(config: Config, backend: Backend) -> int:
    """Train on documents until ``stage.steps``; the exit status."""
    documents = load_documents(config.data, load_tokenizer(config.model.tokenizer), config.seed)
    worker = open_worker(config, backend)
    progress, _ = worker.resume()
    stage, count = config.stage, config.algorithm.sequences_per_step
    watch = Stopwatch()
    with (
        worker.until_saved(),
        progress_bar("sft", stage.steps, progress.step, shown=worker.groups.rank == 0) as advance,
    ):
        while progress.step < stage.steps:
            with watch.phase("time/step_s"):
                chosen = order(len(documents), config.seed, progress.data_position, count)
                metrics = sft.step(
                    [documents[i] for i in chosen],
                    learner=worker.learner,
                    lr=worker.learning_rate(progress.step),
                )
            progress = replace(
                progress, step=progress.step + 1, data_position=progress.data_position + count
            )
            worker.write(progress.step, metrics | watch.lap())
            advance(1, f"loss {metrics['loss']:.3f}")
            due = stage.save_every > 0 and progress.step % stage.save_every == 0
            if due or (stage.save_every >= 0 and progress.step == stage.steps):
                worker.save(progress, None)
    return 0
