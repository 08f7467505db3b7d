"""Evaluation on held-out prompts: within rl, and by itself (``r1mega eval``)."""

import json
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from r1mega.config import Config
from r1mega.data.prompts import load_prompts
from r1mega.data.tokenizer import load_tokenizer
from r1mega.parallel.backend import Backend
from r1mega.records import Group
from r1mega.rewards.answer import extract_answer
from r1mega.rewards.compose import check_errors
from r1mega.run.evaluation import cons_at_k, pass_at_1, pass_at_k
from r1mega.stages.generation import open_generation
from r1mega.stages.worker import open_worker
from r1mega.system.files import write_atomically
from r1mega.system.stopwatch import Stopwatch


def main(config: Config, backend: Backend) -> int:
    """Evaluate the newest checkpoint of runs/<name>, or ``model.init`` when there is none."""
    tokenizer = load_tokenizer(config.model.tokenizer)
    prompts = load_prompts(config.data, tokenizer, config.seed)
    worker = open_worker(config, backend)
    progress, _ = worker.load()
    with open_generation(worker, Stopwatch(), (tokenizer.eos_token_id,)) as generation:
        generation.publish(progress.version + 1)
        chosen = prompts.held_out[: config.stage.eval_prompts]
        drawn = generation.draw_for_evaluation(chosen, step=progress.step)
    metrics = evaluation_metrics(drawn.groups, config.rewards.max_error_fraction)
    if worker.groups.rank == 0:
        path = worker.directory.path / f"eval_step_{progress.step:06d}.json"
        write_atomically(path, json.dumps({"step": progress.step, **metrics}) + "\n")
        Console().print(_table(f"{config.name}, step {progress.step}", metrics))
    return 0


def evaluation_metrics(groups: Sequence[Group], max_error_fraction: float) -> dict[str, float]:
    """pass@1 (mean of k), pass@k and cons@k; a sample whose grading failed has no say."""
    check_errors([score for group in groups for score in group.scores], max_error_fraction)
    correct_PK: list[list[float]] = []
    answers_PK: list[list[str | None]] = []
    lengths: list[int] = []
    for group in groups:
        graded = group.graded
        if not graded:
            continue
        correct_PK.append([score.parts.get("accuracy", score.value) for _, score in graded])
        answers_PK.append([extract_answer(sample.text) for sample, _ in graded])
        lengths += [len(sample.token_ids) for sample, _ in graded]
    k = min(len(correct_K) for correct_K in correct_PK)
    return {
        "eval/pass@1": pass_at_1(correct_PK),
        f"eval/pass@{k}": pass_at_k(correct_PK, k),
        f"eval/cons@{k}": cons_at_k(answers_PK, correct_PK),
        "eval/length_mean": sum(lengths) / len(lengths),
    }


def _table(title: str, metrics: dict[str, float]) -> Table:
    table = Table(title=title)
    table.add_column("")
    table.add_column("held-out", justify="right")
    for name, value in metrics.items():
        table.add_row(name, f"{value:g}")
    return table
