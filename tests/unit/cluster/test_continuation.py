"""What a second launch says about the first, before it starts anything."""

from dataclasses import replace
from pathlib import Path

import pytest

from r1mega.cluster.continuation import nothing_to_do, notices
from r1mega.cluster.errors import JobFailed
from r1mega.config import Config, schema
from r1mega.config.load import dump
from r1mega.parallel.layout import Layout
from r1mega.run.directory import RunDirectory
from r1mega.weights.checkpoints import checkpoint
from r1mega.weights.checkpoints.manifest import commit, partial_folder, record_bytes
from r1mega.weights.names import Spec

CONFIG = Config()


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path, "run")


def with_checkpoint(directory: RunDirectory, step: int, model: schema.Model = CONFIG.model) -> None:
    """The part of a checkpoint that is looked at before a job starts."""
    folder = checkpoint.step_folder(directory.checkpoints, step)
    partial = partial_folder(folder)
    partial.mkdir()
    text = checkpoint.State(
        progress=checkpoint.Progress(step=step, data_position=0),
        layout=Layout(world=1),
        spec=Spec(),
        model=model,
        code="0",
    ).text()
    (partial / "state.json").write_text(text)
    commit(partial, folder, {"state.json": record_bytes(text.encode())})


def test_a_new_run_and_one_on_its_way_go_on(directory: RunDirectory) -> None:
    assert nothing_to_do(CONFIG, directory) is None
    with_checkpoint(directory, 99)
    assert nothing_to_do(CONFIG, directory) is None


@pytest.mark.parametrize("step", [100, 250])
def test_a_run_that_has_its_steps_has_nothing_to_do(directory: RunDirectory, step: int) -> None:
    with_checkpoint(directory, step)
    sentence = nothing_to_do(CONFIG, directory)
    assert sentence is not None
    assert f"is at step {step} and stage.steps=100: nothing to do" in sentence


def test_an_unfinished_checkpoint_does_not_count(directory: RunDirectory) -> None:
    with_checkpoint(directory, 100)
    (directory.checkpoints / "step_000100/manifest.json").unlink()
    assert nothing_to_do(CONFIG, directory) is None


@pytest.mark.parametrize("left", ["metrics", "checkpoint"])
def test_an_earlier_run_is_not_written_over(directory: RunDirectory, left: str) -> None:
    config = replace(CONFIG, run=replace(CONFIG.run, resume=False))
    assert nothing_to_do(config, directory) is None
    if left == "metrics":
        directory.metrics.write_text('{"step": 1}\n')
    else:
        with_checkpoint(directory, 3)
    with pytest.raises(JobFailed, match=r"run\.resume=false would write over the earlier run"):
        nothing_to_do(config, directory)


def test_a_damaged_checkpoint_is_left_to_the_ranks(directory: RunDirectory) -> None:
    with_checkpoint(directory, 3)
    with_checkpoint(directory, 100)
    (directory.checkpoints / "step_000100/state.json").write_text('{"format": ')
    assert nothing_to_do(CONFIG, directory) is None


def test_another_model_is_refused_and_another_layout_is_not(directory: RunDirectory) -> None:
    with_checkpoint(directory, 3)
    deeper = replace(CONFIG, model=replace(CONFIG.model, num_hidden_layers=5))
    with pytest.raises(JobFailed, match="another model: num_hidden_layers was 4, is 5"):
        nothing_to_do(deeper, directory)
    wider = replace(CONFIG, cluster=replace(CONFIG.cluster, learner_processes_per_node=2))
    assert nothing_to_do(wider, directory) is None


def test_mtp_layers_that_were_not_saved_are_refused(directory: RunDirectory) -> None:
    mtp = replace(
        CONFIG,
        model=replace(CONFIG.model, num_nextn_predict_layers=1),
        learner=replace(CONFIG.learner, mtp_loss_weight=0.3),
    )
    saved = replace(CONFIG.model, num_nextn_predict_layers=1)
    with_checkpoint(directory, 3, saved)
    with pytest.raises(JobFailed, match=r"holds no MTP layers.*learner\.mtp_loss_weight=0"):
        nothing_to_do(mtp, directory)


def test_changed_settings_are_told(directory: RunDirectory) -> None:
    dump(CONFIG, directory.config_path)
    assert notices(CONFIG, directory) == []
    changed = replace(CONFIG, learner=replace(CONFIG.learner, lr=1.0), seed=2)
    (told,) = notices(changed, directory)
    assert told.startswith("changed since the last launch: seed was 1, is 2")
    assert "learner.lr was 3e-06, is 1.0" in told


def test_starting_over_is_told(directory: RunDirectory) -> None:
    directory.metrics.write_text('{"step": 1}\n')
    (told,) = notices(CONFIG, directory)
    assert told.endswith("has no checkpoint: starting over at step 0")
