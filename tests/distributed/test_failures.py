"""A job that is hurt ends in a sentence or goes on to the same end; what is on disk stays whole."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from r1mega.weights.checkpoints.manifest import verify
from tests.distributed.test_job import all_gone, descendants, wait_for

ROOT = Path(__file__).parents[2]
LAYERS = [
    "name=run",
    "stage.steps=12",
    "stage.save_every=3",
    "stage.keep_last=9",
    "stage.eval_prompts=4",
    "stage.eval_samples=2",
    "data.size=64",
    "data.held_out=4",
    "data.max_prompt_tokens=48",
    "data.template=brief",
    "algorithm.prompts_per_step=4",
    "algorithm.group_size=4",
    "algorithm.kl_coef=0",
    "rollout.engines=2",
    "rollout.max_response_tokens=16",
    "rollout.context_tokens=64",
    "run.sample_rows=16",
    "learner.precision=fp32",
    "learner.lr=1e-3",
]
VOLATILE = ("time", "learner/tokens_per_s", "rollout/tokens_per_s", "rollout/retries", "sync/")


class Run:
    """``r1mega rl`` in a process group of its own, as from a terminal."""

    def __init__(self, root: Path, *layers: str, largest_file: int | None = None) -> None:
        self.folder = root / "run"
        self._errors = root / "errors"
        self._output = root / "output"
        with self._output.open("w") as output, self._errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "r1mega", "rl", *LAYERS, f"run.root={root}", *layers],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=errors,
                start_new_session=True,
                preexec_fn=None if largest_file is None else lambda: _limit_files(largest_file),
            )
        self._seen: set[int] = set()

    def until(self, condition: Callable[[], object]) -> None:
        """Wait for ``condition`` while the job runs; its end before that fails the test."""

        def met() -> bool:
            self._seen |= descendants(self.process.pid)
            return self.process.poll() is not None or bool(condition())

        wait_for(met)
        assert self.process.poll() is None, self.said()

    def until_step(self, step: int) -> None:
        self.until(lambda: len(rows(self.folder)) >= step)

    def fleet_pid(self, name: str) -> int:
        return int(json.loads((self.folder / f"fleet/{name}.json").read_text())["pid"])

    def pids(self, command: str) -> list[int]:
        """Those of the job's processes whose command line contains ``command``."""
        return [pid for pid in descendants(self.process.pid) if command in _command(pid)]

    def end(self) -> int:
        """The exit code, once nothing of the job is left."""
        code = self.process.wait(200)
        wait_for(lambda: all_gone(self._seen))
        return code

    def said(self) -> str:
        return self._output.read_text() + self._errors.read_text()


def _limit_files(size: int) -> None:
    """Writing past ``size`` fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def outcome(folder: Path) -> tuple[list[dict[str, Any]], str, str]:
    """What must not depend on what happened on the way: metrics, samples, weights."""
    facts = [{k: v for k, v in row.items() if not k.startswith(VOLATILE)} for row in rows(folder)]
    manifest = folder / "checkpoints/step_000012/manifest.json"
    return facts, (folder / "samples.jsonl").read_text(), manifest.read_text()


def assert_whole(folder: Path) -> None:
    for found in sorted((folder / "checkpoints").glob("step_*")):
        verify(found)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps without trouble."""
    run = Run(tmp_path_factory.mktemp("straight"))
    assert run.end() == 0, run.said()
    return run.folder


def copy_without_last(straight: Path, root: Path) -> Path:
    """A run that stopped at step 9 of 12."""
    folder = root / "run"
    shutil.copytree(straight, folder)
    shutil.rmtree(folder / "checkpoints/step_000012")
    return folder


@pytest.mark.parametrize("names", [["engine-0"], ["engine-0", "engine-1"]], ids=["one", "all"])
def test_killed_engines_change_nothing(
    names: list[str], straight: Path, tmp_path: Path, runs: list[Run]
) -> None:
    """With all of them go the weights: they are published again."""
    runs.append(run := Run(tmp_path, "rollout.max_retries=4"))
    run.until_step(4)
    for pid in [run.fleet_pid(name) for name in names]:
        os.kill(pid, signal.SIGKILL)
    assert run.end() == 0, run.said()
    for name in names:
        assert f"{name} was ended by SIGKILL (exit code 137)" in run.said()
    assert outcome(run.folder) == outcome(straight)


def test_killed_graders_change_nothing(straight: Path, tmp_path: Path, runs: list[Run]) -> None:
    runs.append(run := Run(tmp_path))
    for step in (2, 5, 8):
        run.until_step(step)
        for pid in run.pids("worker_main.py"):
            os.kill(pid, signal.SIGKILL)
    assert run.end() == 0, run.said()
    assert outcome(run.folder) == outcome(straight)


def test_killed_rank_ends_the_job(tmp_path: Path, runs: list[Run]) -> None:
    """The others wait for it in a collective: they must not wait long."""
    runs.append(run := Run(tmp_path, "cluster.learner_processes_per_node=2"))
    run.until_step(2)
    (pid,) = [
        pid for pid in run.pids("-m r1mega worker rl") if _environment(pid).get("RANK") == "1"
    ]
    os.kill(pid, signal.SIGKILL)
    assert run.end() == 1
    assert "rank 1 of the learner was ended by SIGKILL (exit code 137)" in run.said()
    runs.append(again := Run(tmp_path, "cluster.learner_processes_per_node=2", "stage.steps=1"))
    assert again.end() == 0, again.said()
    logs = {path.name for path in (again.folder / "logs").iterdir()}
    assert {"learner.log", "learner.log.1", "engine-1.log", "engine-1.log.1"} <= logs


def _environment(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def test_interrupted_run_continues(straight: Path, tmp_path: Path, runs: list[Run]) -> None:
    """Ctrl-C reaches the whole process group."""
    runs.append(run := Run(tmp_path))
    run.until_step(5)
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.end() == 130
    assert_whole(run.folder)
    runs.append(again := Run(tmp_path))
    assert again.end() == 0, again.said()
    assert "loading " in again.said()
    assert outcome(again.folder) == outcome(straight)


def test_run_goes_on_under_another_layout(straight: Path, tmp_path: Path, runs: list[Run]) -> None:
    """It draws the same prompts, and the first rollout, of equal weights, is the same."""
    folder = copy_without_last(straight, tmp_path)
    axes = ("cluster.learner_processes_per_node=2", "parallel.tp=2")
    runs.append(run := Run(tmp_path, *axes))
    assert run.end() == 0, run.said()
    assert "the layout changed (world was 1, is 2, tp was 1, is 2)" in run.said()
    mine, expected = (
        [json.loads(line) for line in (path / "samples.jsonl").read_text().splitlines()]
        for path in (folder, straight)
    )
    assert [row["prompt"] for row in mine] == [row["prompt"] for row in expected]
    first, other = (
        [row["response"] for row in samples if row["step"] == 10] for samples in (mine, expected)
    )
    assert first == other
    step, reference = (rows(path)[-3] for path in (folder, straight))
    for key in ("loss", "learner/grad_norm", "reward/mean"):
        assert step[key] == pytest.approx(reference[key], rel=1e-4, abs=1e-6), key


def test_kill_while_saving_leaves_whole_checkpoints(
    straight: Path, tmp_path: Path, runs: list[Run]
) -> None:
    for delay_s in (0.0, 0.03, 0.06):
        runs.append(run := Run(tmp_path, "stage.save_every=1", "stage.keep_last=2"))
        before = len(rows(run.folder))
        run.until(
            lambda run=run, before=before: (
                len(rows(run.folder)) != before and list(run.folder.glob("checkpoints/.step_*"))
            )
        )
        time.sleep(delay_s)
        os.kill(run.process.pid, signal.SIGKILL)
        run.end()
        assert_whole(run.folder)
    runs.append(run := Run(tmp_path, "stage.save_every=1", "stage.keep_last=2"))
    assert run.end() == 0, run.said()
    kept = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    assert kept == ["step_000011", "step_000012"]
    assert outcome(run.folder) == outcome(straight)


def test_full_disk_keeps_the_last_checkpoint(
    straight: Path, tmp_path: Path, runs: list[Run]
) -> None:
    folder = copy_without_last(straight, tmp_path)
    size = max(path.stat().st_size for path in (folder / "checkpoints/step_000009").iterdir())
    runs.append(run := Run(tmp_path, largest_file=size - 4096))
    assert run.end() == 1
    assert "step_000012 was not written: rank 0: " in run.said()
    assert "what was saved before it stands" in run.said()
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert kept[-1] == "step_000009"
    assert_whole(folder)


def test_damaged_checkpoint_is_skipped_where_the_user_sees_it(
    straight: Path, tmp_path: Path, runs: list[Run]
) -> None:
    folder = copy_without_last(straight, tmp_path)
    shard = folder / "checkpoints/step_000009/optimizer-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    runs.append(run := Run(tmp_path))
    assert run.end() == 0, run.said()
    assert "skipped a checkpoint: " in run.said()
    assert "step_000006" in run.said()
    assert outcome(folder) == outcome(straight)


def test_no_whole_checkpoint_is_no_reason_to_start_over(
    straight: Path, tmp_path: Path, runs: list[Run]
) -> None:
    folder = copy_without_last(straight, tmp_path)
    for manifest in folder.glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    runs.append(run := Run(tmp_path))
    assert run.end() == 1
    assert "no checkpoint in " in run.said()
    assert "has no manifest.json" in run.said()
    assert len(rows(folder)) == 12


def test_finished_run_has_nothing_to_do(straight: Path, tmp_path: Path, runs: list[Run]) -> None:
    shutil.copytree(straight, tmp_path / "run")
    runs.append(run := Run(tmp_path))
    assert run.end() == 0
    assert "is at step 12 and stage.steps=12: nothing to do" in run.said()
    assert outcome(run.folder) == outcome(straight)


def test_evaluation_leaves_the_record_of_a_run_alone(straight: Path, tmp_path: Path) -> None:
    """Also of one that kept no checkpoint."""
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    shutil.rmtree(folder / "checkpoints")
    names = ("metrics.jsonl", "samples.jsonl", "config.yaml")
    before = [(folder / name).read_text() for name in names]
    subprocess.run(
        [sys.executable, "-m", "r1mega", "eval", *LAYERS, f"run.root={tmp_path}"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        timeout=200,
    )
    assert [(folder / name).read_text() for name in names] == before
    assert (folder / "eval_step_000000.json").exists()


def test_broken_weights_end_in_a_sentence(straight: Path, tmp_path: Path, runs: list[Run]) -> None:
    from safetensors.torch import load_file, save_file

    from r1mega.weights.conversion.convert import megatron_to_hf
    from tests.unit.weights.conversion.test_convert import Listening

    broken = tmp_path / "broken"  # a folder without digests, which would have found it
    megatron_to_hf(straight / "checkpoints/step_000012", broken, Listening())
    (shard,) = broken.glob("*.safetensors")
    tensors = load_file(shard)
    tensors["model.layers.2.self_attn.o_proj.weight"][0, 0] = float("nan")
    save_file(tensors, shard)
    runs.append(run := Run(tmp_path, f"model.init={broken}", "rollout.max_retries=2"))
    assert run.end() == 1
    assert "the logits are not finite numbers: the weights are broken" in run.said()
