"""Names below runs/<name>/."""

import subprocess
import sys
from pathlib import Path

import pytest

from r1mega.run.directory import RunDirectory


def test_create_is_repeatable_and_names_are_fixed(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "smoke")
    assert RunDirectory.create(str(tmp_path), "smoke") == run == RunDirectory(tmp_path / "smoke")
    assert run.checkpoints.is_dir()
    assert run.logs.is_dir()
    assert run.fleet.is_dir()
    files = (run.config_path, run.metrics, run.samples, run.report, run.engine_model, run.rollouts)
    assert [path.name for path in files] == [
        "config.yaml",
        "metrics.jsonl",
        "samples.jsonl",
        "report.html",
        "engine_model",
        "rollouts",
    ]


@pytest.mark.parametrize("name", ["", "..", "a/b", "/tmp/x", ".hidden", "a b"])
def test_a_name_that_is_no_folder_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot name a folder"):
        RunDirectory.create(tmp_path, name)


@pytest.mark.timeout(120)
def test_the_run_floor_imports_no_torch() -> None:
    modules = "directory, metrics, samples, evaluation, closing, report"
    program = f"import sys; from r1mega.run import {modules}; print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=True
    )
    assert result.stdout.strip() == "False"
