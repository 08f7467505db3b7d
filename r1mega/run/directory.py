"""Where everything of one run lies: the only place that knows the names below ``runs/<name>/``.

A RunDirectory is a path and nothing else: it opens no file, and two processes that hold equal ones
mean the same run.
"""

import re
from dataclasses import dataclass
from pathlib import Path

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """``RunDirectory(Path("runs/smoke")).metrics == Path("runs/smoke/metrics.jsonl")``."""

    path: Path

    @classmethod
    def create(cls, root: str | Path, name: str) -> "RunDirectory":
        """The directory of run ``name``, made with its folders when they are not there yet."""
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"name={name!r} cannot name a folder: use letters, digits, '.', '_' and '-', "
                "starting with a letter or digit"
            )
        run = cls(Path(root) / name)
        for folder in (run.checkpoints, run.logs, run.fleet):
            folder.mkdir(parents=True, exist_ok=True)
        return run

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def fleet(self) -> Path:
        """One JSON file per live engine, and the router's."""
        return self.path / "fleet"

    @property
    def rollouts(self) -> Path:
        """Kept rollouts, for replay."""
        return self.path / "rollouts"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def engine_weights(self) -> Path:
        """Folders of weights on their way to the engines (``rollout.sync=disk``)."""
        return self.path / "engine_weights"

    @property
    def engine_model(self) -> Path:
        """config.json and tokenizer that the engines start from."""
        return self.path / "engine_model"

    @property
    def engine_packages(self) -> Path:
        """What engines of another environment import of ours."""
        return self.path / "engine_packages"

    @property
    def secrets(self) -> Path:
        """There while engines that ask for a key run; nobody else may read it."""
        return self.path / "secrets"
