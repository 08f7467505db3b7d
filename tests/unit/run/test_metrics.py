"""metrics.jsonl and TensorBoard: every step once, also over crashes and resumes."""

import json
import logging
import math
import sys
import time

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from r1mega.run.directory import RunDirectory
from r1mega.run.metrics import MetricsWriter, read_metrics


def steps(run: RunDirectory) -> list[int]:
    return [row["step"] for row in read_metrics(run.metrics)]


def test_rows_are_flat_and_complete(run: RunDirectory) -> None:
    writer = MetricsWriter(run)
    writer.write(0, {"eval/pass@1": 0.25})
    writer.write(1, {"reward/mean": 0.5, "version": 1, "loss": np.float32(0.5)})
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]  # before close
    writer.close()
    assert [row.pop("time_s") >= 0 for row in rows] == [True, True]
    assert rows == [
        {"step": 0, "eval/pass@1": 0.25},
        {"step": 1, "reward/mean": 0.5, "version": 1.0, "loss": 0.5},
    ]


def test_a_diverging_run_is_recorded(run: RunDirectory, caplog: pytest.LogCaptureFixture) -> None:
    writer = MetricsWriter(run)
    with caplog.at_level(logging.WARNING):
        writer.write(1, {"loss": math.nan, "learner/grad_norm": math.inf, "reward/mean": 0.5})
    writer.close()
    assert "loss=nan, learner/grad_norm=inf" in caplog.text
    (row,) = read_metrics(run.metrics)
    assert [row[key] for key in ("loss", "learner/grad_norm", "reward/mean")] == [None, None, 0.5]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss": "0.5"}, "loss='0.5' is a str"),
        ({"loss": None}, "loss=None is a NoneType"),
        ({"loss": 1j}, "is a complex"),
        ({"step": 3}, "'step' is written by the writer"),
    ],
)
def test_a_bad_value_names_its_key(run: RunDirectory, values: dict, message: str) -> None:
    writer = MetricsWriter(run)
    with pytest.raises(ValueError, match=message):
        writer.write(1, values)
    writer.close()
    assert steps(run) == []


def test_steps_do_not_go_back(run: RunDirectory) -> None:
    writer = MetricsWriter(run)
    writer.write(5, {"loss": 1.0})
    with pytest.raises(ValueError, match=r"step 4 after those of step 5.*truncate_after\(3\)"):
        writer.write(4, {"loss": 1.0})
    writer.close()


def test_an_evaluation_joins_the_row_of_its_step(run: RunDirectory) -> None:
    writer = MetricsWriter(run)
    writer.write(1, {"loss": 1.0})
    writer.write(2, {"loss": 2.0, "eval/pass@1": 0.25})
    writer.close()
    evaluation = MetricsWriter(run)  # another process, later
    evaluation.write(2, {"eval/pass@1": 0.5, "eval/pass@4": math.nan})
    evaluation.close()
    first, second = read_metrics(run.metrics)
    assert (first["step"], first["loss"]) == (1, 1.0)
    del second["time_s"]
    assert second == {"step": 2, "loss": 2.0, "eval/pass@1": 0.5, "eval/pass@4": None}


def test_resume_has_each_step_once(run: RunDirectory) -> None:
    writer = MetricsWriter(run)
    for step in range(1, 6):
        writer.write(step, {"loss": float(step)})
    writer.close()
    with run.metrics.open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    assert steps(run) == [1, 2, 3, 4, 5]

    time.sleep(1.1)  # TensorBoard orders its files by the second in their names
    resumed = MetricsWriter(run)
    resumed.truncate_after(3)
    assert steps(run) == [1, 2, 3]
    for step in (4, 5, 6):
        resumed.write(step, {"loss": 10.0 * step})
    resumed.close()
    rows = read_metrics(run.metrics)
    assert [(row["step"], row["loss"]) for row in rows] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 40.0),
        (5, 50.0),
        (6, 60.0),
    ]
    times = [row["time_s"] for row in rows]
    assert times == sorted(times)

    events = EventAccumulator(str(run.tensorboard), purge_orphaned_data=True).Reload()
    scalars = {event.step: event.value for event in events.Scalars("loss")}
    assert scalars == {1: 1.0, 2: 2.0, 3: 3.0, 4: 40.0, 5: 50.0, 6: 60.0}
    assert len(events.Scalars("loss")) == 6


def test_time_continues_over_a_restart(run: RunDirectory) -> None:
    run.metrics.write_text('{"step": 1, "time_s": 1000.0, "loss": 1.0}\n')
    writer = MetricsWriter(run)
    writer.write(2, {"loss": 1.0})
    assert read_metrics(run.metrics)[-1]["time_s"] >= 1000.0
    writer.truncate_after(-1)  # from the beginning
    writer.write(0, {"loss": 1.0})
    writer.close()
    (row,) = read_metrics(run.metrics)
    assert row["step"] == 0
    assert row["time_s"] < 1000.0


def test_appending_after_a_half_written_row(run: RunDirectory) -> None:
    run.metrics.write_text('{"step": 1, "time_s": 1.0}\n{"step": 2, "time_s": 2.' + "0" * 200_000)
    writer = MetricsWriter(run)
    writer.write(2, {"loss": 1.0})
    writer.close()
    assert steps(run) == [1, 2]


def test_a_damaged_row_names_its_place(run: RunDirectory) -> None:
    run.metrics.write_text('{"step": 1, "time_s": 0}\nnonsense\n{"step": 2, "time_s": 0}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: expected a JSON object, got b'nonsen"):
        read_metrics(run.metrics)
    run.metrics.write_text('{"loss": 1}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:1: expected an object with a step"):
        read_metrics(run.metrics)


def test_no_file_is_no_rows(run: RunDirectory) -> None:
    assert read_metrics(run.metrics) == []


def test_missing_wandb_is_one_sentence(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # what Python does for a failed import
    with pytest.raises(ValueError, match=r"run.wandb_project=r1 needs W&B: pip install wandb"):
        MetricsWriter(run, wandb_project="r1")
