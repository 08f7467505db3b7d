"""Which checkpoints a run has, and what ``state.json`` says of one. ``saving`` writes them.

    step_000040/
      weights-00000.safetensors    the rectangles of Hugging Face tensors that rank 0 stores
      optimizer-00000.safetensors  rank 0's ungathered ranges: fp32 weights, moments, step counts
      rng-00000.safetensors        generator states
      reference/                   the reference policy, if any: weights-*.safetensors, index.json
      index.json                   every tensor: shape, dtype and pieces (file, key, region, digest)
      state.json                   step, data position, versions, layout, the network
      hf/                          config.json, tokenizer: what makes it a Hugging Face folder
      manifest.json                bytes and digest of every file above

No pickle. Weights are found under Hugging Face names, so that they load under any layout.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from r1mega.config import schema
from r1mega.parallel.layout import Layout
from r1mega.weights.checkpoints.manifest import (
    CheckpointError,
    read_manifest,
    remove,
    verify,
    verify_file,
)
from r1mega.weights.names import Spec
from r1mega.weights.slices import FORMAT

STATE = "state.json"
REFERENCE = "reference"
COMPANIONS = "hf"


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Where a run stands."""

    step: int
    data_position: int  # prompts or documents consumed
    rollout: int = 0  # rollouts finished
    version: int = 0  # of the weights the engines held


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """What ``state.json`` says. ``model`` is without where weights and tokenizer came from."""

    progress: Progress
    layout: Layout
    spec: Spec
    model: schema.Model
    code: str  # the version of r1mega that wrote it

    def text(self) -> str:
        """The content of the file."""
        return json.dumps(
            {
                "format": FORMAT,
                "progress": asdict(self.progress),
                "layout": asdict(self.layout),
                "spec": asdict(self.spec),
                "model": _network(self.model),
                "code": self.code,
            },
            indent=1,
        )


def read_state(folder: Path) -> State:
    """Raises CheckpointError when ``state.json`` is missing or damaged."""
    path = folder / STATE
    try:
        values = json.loads(path.read_bytes())
        model = values["model"]
        scaling = model.pop("rope_scaling")
        return State(
            progress=Progress(**values["progress"]),
            layout=Layout(**values["layout"]),
            spec=Spec(**values["spec"]),
            model=schema.Model(**model, rope_scaling=scaling and schema.RopeScaling(**scaling)),
            code=values["code"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error!r}): restore it") from error


def check_resumable(folder: Path, state: State, model: schema.Model, spec: Spec) -> None:
    """Raises CheckpointError when a run of ``model`` built as ``spec`` cannot go on from there.

    The layout may be another.
    """
    saved, present = _network(state.model), _network(model)
    if differing := ", ".join(
        f"{key} was {saved[key]}, is {value}"
        for key, value in present.items()
        if saved[key] != value
    ):
        raise CheckpointError(f"{folder} is a checkpoint of another model: {differing}")
    if spec.mtp and not state.spec.mtp:
        raise CheckpointError(
            f"{folder} holds no MTP layers: go on without them (learner.mtp_loss_weight=0), or "
            f"start a new run from its weights with model.init={folder}"
        )


def notices(state: State, layout: Layout, spec: Spec) -> list[str]:
    """What is not as it was for a run that goes on from ``state``, in sentences."""
    found = []
    before, now = asdict(state.layout), asdict(layout)
    changed = [f"{key} was {before[key]}, is {v}" for key, v in now.items() if v != before[key]]
    if changed:
        found.append(
            f"the layout changed ({', '.join(changed)}): the optimizer is cut anew, and random "
            "numbers start from the seed"
        )
    if state.spec.mtp and not spec.mtp:
        found.append("its MTP layers are left out")
    return found


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step_{step:06d}"


def shard(kind: str, rank: int) -> str:
    """The file of one rank; ``kind`` is "weights", "optimizer" or "rng"."""
    return f"{kind}-{rank:05d}.safetensors"


def saved(checkpoints: Path) -> list[Path]:
    """What has a checkpoint's name, oldest first; step_000040.bak, somebody's copy, has not."""
    folders = [path for path in checkpoints.glob("step_*") if _step(path).isdecimal()]
    return sorted(folders, key=lambda folder: int(_step(folder)))


def newest(
    folders: Sequence[Path], verified: Callable[[Path], None] = verify
) -> tuple[Path | None, list[str]]:
    """The last of ``saved`` folders that is ``verified``, and why any later one was skipped."""
    skipped: list[str] = []
    for folder in folders[::-1]:
        try:
            verified(folder)
        except CheckpointError as error:
            skipped.append(str(error))
            continue
        return folder, skipped
    return None, skipped


def verify_state(folder: Path) -> None:
    """As ``verify``, of manifest and ``state.json`` alone: what a launcher can afford to read."""
    record = read_manifest(folder).get(STATE)
    if record is None:
        raise CheckpointError(f"{folder} has no {STATE} in its manifest: it is no checkpoint")
    verify_file(folder / STATE, record)


def prune(newest: Path, keep_last: int) -> None:
    """Of the checkpoints up to ``newest`` keep the last ``keep_last``.

    A later one can only be one that did not verify: it must not crowd out those that do.
    """
    folders = saved(newest.parent)
    up_to_newest = folders[: folders.index(newest) + 1]
    for folder in up_to_newest[:-keep_last]:
        remove(folder)


def _step(folder: Path) -> str:
    return folder.name.removeprefix("step_")


def _network(model: schema.Model) -> dict[str, Any]:
    """The sizes, without where weights and tokenizer came from."""
    return {k: v for k, v in asdict(model).items() if k not in ("init", "tokenizer")}
