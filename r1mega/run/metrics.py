"""The numbers of a run, one flat object per step: metrics.jsonl, TensorBoard, W&B when configured.

Invariants: a step has one row and steps rise (``truncate_after`` forgets what a resumed run will do
again; an evaluation of the last step joins the row of that step); ``time_s`` is time spent on the
steps that are there, over all restarts; a value that is not finite is null in metrics.jsonl and
itself in TensorBoard. docs/metrics.md explains every key.
"""

import logging
import math
import numbers
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from r1mega.run.directory import RunDirectory
from r1mega.run.rows import append_rows, iterate_rows, replace_last_row, truncate_after

_RESERVED = ("step", "time_s")
logger = logging.getLogger(__name__)


class MetricsWriter:
    """``writer.write(3, {"reward/mean": 0.5})``; one process per run holds one."""

    def __init__(self, directory: RunDirectory, wandb_project: str | None = None) -> None:
        directory.path.mkdir(parents=True, exist_ok=True)
        self._path = directory.metrics
        self._last, self._origin = _position(read_metrics(self._path))
        self._events = EventFileWriter(str(directory.tensorboard))
        self._wandb = _start_wandb(directory, wandb_project) if wandb_project else None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append the row of ``step``, or add to it when it is the last; new values replace old."""
        last_step = self._last.get("step", -1)
        if step < last_step:
            raise ValueError(
                f"metrics of step {step} after those of step {last_step} in {self._path}: "
                f"a run that goes back must call truncate_after({step - 1}) first"
            )
        numeric = {key: _number(key, value) for key, value in values.items()}
        odd = [f"{key}={value}" for key, value in numeric.items() if not math.isfinite(value)]
        if odd:
            logger.warning("step %d has non-finite metrics: %s", step, ", ".join(odd))
        time_s = round(time.monotonic() - self._origin, 3)
        if step == last_step:
            self._last = {**self._last, "time_s": time_s, **numeric}
            replace_last_row(self._path, self._last)
        else:
            self._last = {"step": step, "time_s": time_s, **numeric}
            append_rows(self._path, [self._last])
        self._write_events(step, numeric)
        if self._wandb is not None:
            self._wandb.log({"step": step, "time_s": time_s, **numeric})

    def truncate_after(self, step: int) -> None:
        """Forget every later step, here and in TensorBoard, before it is done again."""
        truncate_after(self._path, step)
        self._last, self._origin = _position(read_metrics(self._path))
        start = SessionLog(status=SessionLog.START)  # TensorBoard drops what is at or after it
        self._events.add_event(Event(wall_time=time.time(), step=step + 1, session_log=start))
        self._events.flush()

    def close(self) -> None:
        self._events.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _write_events(self, step: int, values: Mapping[str, float]) -> None:
        scalars = [Summary.Value(tag=key, simple_value=value) for key, value in values.items()]
        summary = Summary(value=scalars)
        self._events.add_event(Event(wall_time=time.time(), step=step, summary=summary))
        self._events.flush()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, without one that is half written; null is None."""
    return list(iterate_rows(path))


def _position(rows: list[dict[str, Any]]) -> tuple[dict[str, Any], float]:
    """The last row ({}: none), and the clock reading at which time_s would have been 0."""
    last = rows[-1] if rows else {}
    return last, time.monotonic() - last.get("time_s", 0.0)


def _number(key: str, value: Any) -> float:
    if key in _RESERVED:
        raise ValueError(f"{key!r} is written by the writer itself: choose another key")
    if not isinstance(value, numbers.Real):
        raise ValueError(f"{key}={value!r} is a {type(value).__name__}: pass a Python number")
    return float(value)


def _start_wandb(directory: RunDirectory, project: str) -> Any:
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise ValueError(
            f"run.wandb_project={project} needs W&B: pip install wandb, or leave the key out"
        ) from error
    # Steps go along as a column: W&B's own counter refuses to go back when a run is resumed.
    name = directory.path.name
    run = wandb.init(project=project, name=name, id=name, resume="allow", dir=str(directory.path))
    run.define_metric("*", step_metric="step")
    return run
