"""The floors hold, and the contract that guards them would notice a step upward or sideways."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_the_floors_hold() -> None:
    done = _lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "statement", "reported"),
    [
        ("config/upward.py", "import r1mega.records", "r1mega.config is not allowed to import"),
        ("data/sideways.py", "import r1mega.rewards", "r1mega.data is not allowed to import"),
        ("learner/sideways.py", "import r1mega.rollout", "r1mega.learner is not allowed to import"),
        ("config/heavy.py", "import torch", "r1mega.config is not allowed to import torch"),
        ("homeless/__init__.py", "", "homeless"),
    ],
)
def test_a_breach_is_noticed(file: str, statement: str, reported: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    ignore = shutil.ignore_patterns("__pycache__")
    package = Path(shutil.copytree(ROOT / "r1mega", tmp_path / "r1mega", ignore=ignore))
    (package / file).parent.mkdir(exist_ok=True)
    (package / file).write_text(statement + "\n")
    done = _lint_imports(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert reported in done.stdout
