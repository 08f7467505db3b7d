"""Arguments of the tools, and the exit status that a shell sees."""

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

import pytest

from tests.unit.weights.weight_folders import LLAMA, random_weights, write_hf

TOOLS = Path(__file__).parents[3] / "tools"


@pytest.fixture(scope="module")
def command_line() -> ModuleType:
    """Tools are scripts, not a package."""
    spec = importlib.util.spec_from_file_location("command_line", TOOLS / "command_line.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Options:
    pp: int = 1
    kind: Literal["a", "b"] = "a"
    quick: bool = False
    beside: Path | None = None
    name: str = "*"


def test_folders_and_options_in_any_order(command_line: ModuleType) -> None:
    arguments = ["pp=3", "in", "quick=true", "out", "beside=x/y", "name=a=b"]
    folders, options = command_line.parse(arguments, ("IN", "OUT"), Options)
    assert folders == [Path("in"), Path("out")]
    assert options == Options(pp=3, quick=True, beside=Path("x/y"), name="a=b")
    assert command_line.parse(["in"], ("IN",), Options) == ([Path("in")], Options())
    assert command_line.parse(["./pp=3"], ("IN",), Options) == ([Path("pp=3")], Options())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["in", "kid=a"], "unknown key 'kid': did you mean kind?"),
        (["in", "zzz=1"], "unknown key 'zzz': there are pp, kind, quick, beside, name"),
        (["in", "pp=0"], "pp must be a whole number of at least 1, got '0'"),
        (["in", "pp=two"], "pp must be a whole number of at least 1, got 'two'"),
        (["in", "kind=c"], "kind must be one of a, b, got 'c'"),
        (["in", "quick=yes"], "quick must be one of true, false, got 'yes'"),
        (["pp=1"], "expected IN, got none"),
        (["in", "out"], "expected IN, got in out"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str], sentence: str, command_line: ModuleType
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        command_line.parse(arguments, ("IN",), Options)


def run(tool: str, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, TOOLS / tool, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_the_converters_run_as_scripts(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", LLAMA, random_weights(LLAMA))
    done = run("hf_to_megatron.py", tmp_path / "hf", tmp_path / "ours", "tp=2", "pp=2")
    assert (done.returncode, done.stdout) == (0, "")
    assert "verified" in done.stderr
    done = run("megatron_to_hf.py", tmp_path / "ours", tmp_path / "back", "dtype=fp8")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "back/model.safetensors.index.json").exists()
    done = run("megatron_to_hf.py", tmp_path / "ours", tmp_path / "back", "dtype=bf16")
    assert done.returncode == 1
    assert done.stderr.strip() == (
        f"{tmp_path / 'back'} is there and not empty: name another folder or remove it"
    )
