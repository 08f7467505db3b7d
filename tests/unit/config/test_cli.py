"""The command line: light, one sentence per mistake, and ``show`` with every derived quantity."""

import subprocess
import sys
from pathlib import Path

import pytest

from r1mega import cli
from r1mega.config import load

CONFIGS = Path(__file__).parents[3] / "configs"
R1_671B = [
    str(CONFIGS / name)
    for name in ("stage/r1_zero.yaml", "model/deepseek_v3.yaml", "cluster/h100x256.yaml")
]


def _row(output: str, quantity: str) -> str:
    """The cells right of ``quantity``, single-spaced."""
    line = next(line for line in output.splitlines() if line.strip().startswith(quantity + " "))
    return " ".join(line.strip().removeprefix(quantity).split())


def test_show_prints_the_671b_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")  # a narrow terminal wraps cells
    assert cli.main(["show", *R1_671B]) == 0
    output = capsys.readouterr().out
    assert _row(output, "learner ranks (world)").startswith("192 ")
    assert _row(output, "dense axes").startswith("tp 8 cp 1 dp 2 pp 12")
    assert _row(output, "expert axes").startswith("etp 1 ep 16 edp 1 pp 12")
    assert _row(output, "layers per stage").startswith("6 5 5 5 5 5 5 5 5 5 5 5 ")
    assert _row(output, "parameters").startswith("671,026,419,200")
    assert _row(output, "active per token").startswith("37,552,297,472")
    assert _row(output, "samples per step").startswith("512 ")
    assert _row(output, "samples per rollout").startswith("8,192 ")
    assert _row(output, "rollouts (weight syncs)").startswith("650 ")
    assert _row(output, "response limit later").startswith("65,536 ")
    assert _row(output, "nodes").startswith("32 ")


def test_the_yaml_that_show_prints_loads_back(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    layers = [*R1_671B, f"run.root={tmp_path / ('long' * 40)}"]
    assert cli.main(["show", *layers]) == 0
    shown = tmp_path / "shown.yaml"
    shown.write_text(capsys.readouterr().out.split("\n\n")[0])
    assert load([str(shown)]) == load(layers)


@pytest.mark.parametrize(
    "verb", [["show"], ["rl"], ["sft"], ["eval"], ["report"], ["worker", "rl"]]
)
def test_a_mistake_is_one_sentence_on_stderr(
    verb: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*verb, "learner.lrr=1"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == (
        "r1mega: learner.lrr=1: unknown key 'learner.lrr'; did you mean 'learner.lr'?\n"
    )


def test_the_verb_decides_the_kind_of_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sft", "stage.kind=rl", "data.source=gsm8k"]) == 2
    assert "data.source=gsm8k does not serve sft" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["worker", "--help"], ["rl", "nope=1"]])
def test_the_command_line_imports_no_torch(arguments: list[str]) -> None:
    program = (
        "import contextlib, sys\n"
        "from r1mega import cli\n"
        "with contextlib.suppress(SystemExit):\n"
        "    cli.main(sys.argv[1:])\n"
        "heavy = {'torch', 'numpy', 'megatron', 'transformers', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_help_names_the_verbs_and_hides_the_worker(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    output = capsys.readouterr().out
    for verb in ("show", "sft", "rl", "eval", "report"):
        assert f"\n    {verb} " in output
    assert "worker" not in output


def test_an_interrupt_ends_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(layers: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load", interrupted)
    assert cli.main(["show"]) == 130
