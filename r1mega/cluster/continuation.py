"""What an earlier launch left in the run directory, judged before any process starts."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from r1mega.cluster.errors import JobFailed
from r1mega.config import ConfigError, load
from r1mega.config.derived import mtp_mode
from r1mega.config.schema import Config
from r1mega.run.directory import RunDirectory
from r1mega.weights.checkpoints import checkpoint
from r1mega.weights.checkpoints.manifest import CheckpointError
from r1mega.weights.names import Spec


def nothing_to_do(config: Config, directory: RunDirectory) -> str | None:
    """The sentence for a run that has its steps already; ``JobFailed`` when it cannot go on.

    Only manifests and states are read here; the ranks check all bytes before they continue.
    """
    folder, _ = checkpoint.newest(checkpoint.saved(directory.checkpoints), checkpoint.verify_state)
    if not config.run.resume:
        if folder is not None or directory.metrics.exists():
            raise JobFailed(
                f"run.resume=false would write over the earlier run in {directory.path}: give this "
                "one another name=..., or remove that folder"
            )
        return None
    if folder is None:
        return None
    try:
        state = checkpoint.read_state(folder)
        spec = Spec(mtp=mtp_mode(config.learner, config.stage) != "none")
        checkpoint.check_resumable(folder, state, config.model, spec)
    except CheckpointError as error:
        raise JobFailed(str(error)) from error
    step = state.progress.step
    if step < config.stage.steps:
        return None
    return (
        f"{directory.path} is at step {step} and stage.steps={config.stage.steps}: nothing to do; "
        "raise stage.steps to go on"
    )


def notices(config: Config, directory: RunDirectory) -> list[str]:
    """What a person who launches this run again should know: settings that are others now."""
    starts_over = directory.metrics.exists() and not checkpoint.saved(directory.checkpoints)
    found = [f"{directory.path} has no checkpoint: starting over at step 0"] if starts_over else []
    if not directory.config_path.exists():
        return found
    try:
        before = load([str(directory.config_path)])
    except ConfigError:  # written by another version of this program
        return found
    changed = list(_differences(asdict(before), asdict(config)))
    return [*found, f"changed since the last launch: {', '.join(changed)}"] if changed else found


def _differences(
    before: Mapping[str, Any], now: Mapping[str, Any], path: str = ""
) -> Iterator[str]:
    for key, value in now.items():
        if (
            isinstance(value, dict)
            and isinstance(before[key], dict)
            and set(value) == set(before[key])
        ):
            yield from _differences(before[key], value, f"{path}{key}.")
        elif value != before[key]:
            yield f"{path}{key} was {before[key]}, is {value}"
