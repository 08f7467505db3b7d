"""tools/inspect_checkpoint.py and tools/torch_dist.py, from the command line."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from r1mega.parallel.layout import Layout
from tests.unit.weights.weight_folders import (
    TIED,
    V3,
    random_weights,
    write_checkpoint,
    write_hf,
)

TOOLS = Path(__file__).parents[3] / "tools"
Tool = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tool:
    """Runs tools/NAME.py with arguments: (exit status, standard output, standard error)."""
    monkeypatch.syspath_prepend(str(TOOLS))

    def run(name: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(TOOLS / f"{name}.py"), run_name="__main__")
        return (int(exit_.value.code or 0), *capsys.readouterr())

    return run


def test_inspects(tool: Tool, tmp_path: Path) -> None:
    weights = random_weights(V3)
    folder = write_checkpoint(tmp_path / "c", V3, weights, Layout(world=4, tp=2, pp=2, ep=2))
    status, out, _ = tool("inspect_checkpoint", folder)
    assert status == 0
    assert len(out.splitlines()) == 1 + len(weights)
    assert out.startswith("checkpoint of deepseek_v3, step 7, layout world=4 tp=2 pp=2 ep=2,")
    assert tool("inspect_checkpoint", folder, "list=false")[1].count("\n") == 1
    status, out, _ = tool("inspect_checkpoint", folder, "match=*.norm.weight", "json=true")
    summary, norm = map(json.loads, out.splitlines())
    assert (summary["row"], summary["num_tensors"]) == ("Summary", len(weights))
    assert (norm["name"], norm["shape"], norm["num_nan"]) == ("model.norm.weight", [64], 0)


def test_compares(tool: Tool, tmp_path: Path) -> None:
    weights = random_weights(TIED)
    folder = write_checkpoint(tmp_path / "c", TIED, weights, Layout(world=2, tp=2))
    other = write_hf(tmp_path / "hf", TIED, weights)
    status, out, _ = tool("inspect_checkpoint", folder, f"compare={other}")
    assert (status, out.splitlines()[-1]) == (0, f"{len(weights)} tensors are equal bit for bit")
    weights["model.norm.weight"][3] = 9.0
    other = write_hf(tmp_path / "changed", TIED, weights)
    status, out, err = tool("inspect_checkpoint", folder, f"compare={other}")
    assert status == 1
    assert "model.norm.weight differs by up to" in out.splitlines()[-1]
    assert "at [3]" in out.splitlines()[-1]
    assert f"1 of {len(weights)} tensors differ" in err


def test_damage_is_one_sentence_and_status_1(tool: Tool, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", TIED, random_weights(TIED), Layout(world=1))
    path = folder / "weights-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    status, out, err = tool("inspect_checkpoint", folder)
    assert (status, out) == (1, "")
    sentence = err.strip().splitlines()[-1]
    assert sentence.startswith(f"{path} is damaged (its digest is not the manifest's)")
    assert "first of all" in sentence
    assert "model.norm.weight" in sentence
    # Even without reading every file, a tensor that is read is compared with its digest.
    status, _, err = tool("inspect_checkpoint", folder, "verify=false")
    assert (status, "model.norm.weight is damaged" in err) == (1, True)


def test_torch_dist_and_back(tool: Tool, tmp_path: Path) -> None:
    weights = random_weights(V3, mtp=True)
    source = write_checkpoint(tmp_path / "c", V3, weights, Layout(world=2, tp=2))
    theirs, back = tmp_path / "theirs", tmp_path / "back"
    assert tool("torch_dist", "export", source, theirs)[0] == 0
    assert tool("torch_dist", "import", theirs, back, "pp=2")[0] == 0
    status, out, _ = tool("inspect_checkpoint", source, f"compare={back}")
    assert (status, out.splitlines()[-1]) == (0, f"{len(weights)} tensors are equal bit for bit")
    assert tool("inspect_checkpoint", theirs, f"compare={back}", "list=false")[0] == 0
    status, _, err = tool("torch_dist", "export", source, theirs)
    assert (status, "is there already" in err) == (1, True)
    assert (
        tool("torch_dist", "import", write_hf(tmp_path / "h", V3, weights), tmp_path / "o")[0] == 0
    )
    (theirs / "hf/config.json").unlink()
    status, _, err = tool("torch_dist", "import", theirs, tmp_path / "again")
    assert (status, "has no config.json to say what network" in err) == (1, True)
    assert tool("torch_dist", "import", theirs, tmp_path / "again", f"hf={source / 'hf'}")[0] == 0


def test_what_is_not_there_is_said_first(tool: Tool, tmp_path: Path) -> None:
    weights = random_weights(TIED)
    folder = write_checkpoint(tmp_path / "checkpoints/step_000007", TIED, weights, Layout(world=1))
    status, out, err = tool("inspect_checkpoint", folder, "compare=/nowhere")
    assert (status, out, "/nowhere: No such file" in err) == (1, "", True)
    status, _, err = tool("inspect_checkpoint", folder, "match=*nrm*")
    assert (status, "no tensor has a name like *nrm*" in err) == (1, True)
    for above in (folder.parent, tmp_path):
        status, _, err = tool("inspect_checkpoint", above)
        assert (status, f"{above} holds checkpoints: name one, as {folder}" in err) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("inspect_checkpoint", "/nowhere"), "/nowhere: No such file or directory"),
        (("inspect_checkpoint", "a", "b"), "expected DIR, got a b"),
        (("inspect_checkpoint", "a", "lst=false"), "unknown key 'lst': did you mean list?"),
        (("torch_dist", "move", "a", "b"), "expected import or export, got move"),
        (("torch_dist", "export", "a", "b", "spec=nemo"), "spec must be one of te, local"),
        (("torch_dist", "export", "a", "b", "tp=2"), "unknown key 'tp': there are spec"),
    ],
)
def test_bad_arguments(arguments: tuple[str, ...], words: str, tool: Tool) -> None:
    status, out, err = tool(*arguments)
    assert (status, out) == (1, "")
    assert words in err
    assert "Traceback" not in err
