"""R1-Zero through the command line: launcher, router, engines, learner; the real thing, small."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SMALL = [
    "configs/smoke/r1_zero.yaml",
    "name=run",
    "stage.steps=4",
    "stage.eval_every=2",
    "stage.eval_prompts=4",
    "stage.eval_samples=2",
    "stage.save_every=2",
    "stage.keep_last=9",
    "data.size=64",
    "algorithm.prompts_per_step=4",
    "algorithm.group_size=4",
    "rollout.max_response_tokens=24",
]
VOLATILE = ("time", "learner/tokens_per_s", "rollout/tokens_per_s", "rollout/retries", "sync/")


def r1mega(*arguments: str, timeout_s: float = 280.0) -> subprocess.CompletedProcess[str]:
    """``r1mega ...`` as a user runs it."""
    return subprocess.run(
        [sys.executable, "-m", "r1mega", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def rl(root: Path, *more: str) -> Path:
    done = r1mega("rl", *SMALL, f"run.root={root}", *more)
    assert done.returncode == 0, done.stderr[-4000:]
    return root / "run"


def rows(run_folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def facts(run_folder: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if not key.startswith(VOLATILE)}
        for row in rows(run_folder)
    ]


def digests(run_folder: Path, step: int) -> dict[str, str]:
    path = run_folder / "checkpoints" / f"step_{step:06d}" / "manifest.json"
    files = json.loads(path.read_text())["files"]
    return {name: entry["xxh3_128"] for name, entry in files.items()}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, base: str) -> Path:
    """Four steps without interruption."""
    return rl(tmp_path_factory.mktemp("straight"), base)


def test_the_sampler_equals_the_learner_before_and_after_updates(straight: Path) -> None:
    steps = [row for row in rows(straight) if "mismatch/max" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert max(row["mismatch/max"] for row in steps) < 1e-5
    assert max(row["learner/grad_norm"] for row in steps) > 1e-3  # the weights did change
    assert [row["version"] for row in steps] == [0, 1, 2, 3]


def test_every_response_carries_the_version_it_was_drawn_from(straight: Path) -> None:
    samples = [json.loads(line) for line in (straight / "samples.jsonl").read_text().splitlines()]
    assert {row["step"] for row in samples} == {1, 2, 3, 4}
    for row in samples:
        assert row["versions"] == [[row["step"] - 1, 0, row["length"]]]


def test_every_metric_is_documented(straight: Path) -> None:
    documented = re.findall(r"^\| `([^`]+)`", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE)
    written = {re.sub(r"@[2-9]\d*$", "@k", key) for row in rows(straight) for key in row}
    assert written - set(documented) == set()


def test_resume_equals_uninterrupted_bit_for_bit(straight: Path, base: str, tmp_path: Path) -> None:
    """Engines in the loop: the continued run draws the same samples and ends in the same bits."""
    shutil.copytree(straight, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step_000004")
    resumed = rl(tmp_path, base)
    assert facts(resumed) == facts(straight)
    assert digests(resumed, 4) == digests(straight, 4)
    assert (resumed / "samples.jsonl").read_text() == (straight / "samples.jsonl").read_text()


def test_dp2_and_temperature_and_several_steps_per_rollout(base: str, tmp_path: Path) -> None:
    """Groups of 3 samples straddle the two leaders; frozen log-probs; a mid-run reference."""
    run_folder = rl(
        tmp_path,
        base,
        "parallel.tp=1",
        "parallel.pp=1",
        "parallel.ep=2",
        "cluster.learner_processes_per_node=2",
        "algorithm.prompts_per_step=3",
        "algorithm.group_size=3",
        "algorithm.reference_refresh_steps=2",
        "rollout.steps=2",
        "rollout.temperature=0.7",
        "learner.lr=1e-3",
    )
    steps = [row for row in rows(run_folder) if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert [row["loss/samples"] for row in steps] == [9, 9, 9, 9]
    assert max(row["mismatch/max"] for row in steps) < 1e-5
    assert steps[1]["policy/ratio_max"] != 1.0  # the second update of a rollout has moved
    assert [row["version"] for row in (steps[0], steps[2])] == [0, 1]
    assert steps[2]["policy/kl"] == 0.0  # the reference was replaced after step 2
    assert steps[1]["policy/kl"] > 0.0


def test_keep_a_rollout_and_train_on_it(straight: Path, base: str, tmp_path: Path) -> None:
    """Rollout only, then training only: the first step is the one of the whole run."""
    kept = rl(tmp_path / "a", base, "stage.only=rollout", "stage.steps=1", "stage.eval_every=0")
    assert len(list((kept / "rollouts").glob("rollout_*.jsonl"))) == 1
    trained = rl(
        tmp_path / "b",
        base,
        "stage.only=train",
        "stage.steps=1",
        "stage.eval_every=0",
        f"rollout.replay={kept / 'rollouts'}",
    )
    whole = next(row for row in rows(straight) if row["step"] == 1)
    (alone,) = rows(trained)
    for key in ("loss", "learner/grad_norm", "policy/entropy", "reward/mean"):
        assert alone[key] == whole[key], key


def test_eval_and_report_of_a_finished_run(straight: Path, base: str) -> None:
    root = f"run.root={straight.parent}"
    done = r1mega("eval", *SMALL, base, root)
    assert done.returncode == 0, done.stderr[-4000:]
    facts_ = json.loads((straight / "eval_step_000004.json").read_text())
    last = rows(straight)[-1]
    assert {key: last[key] for key in facts_ if key.startswith("eval/")} == {
        key: value for key, value in facts_.items() if key.startswith("eval/")
    }
    assert r1mega("report", *SMALL, base, root).returncode == 0
    assert "<svg" in (straight / "report.html").read_text()


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        (["model.init=nowhere"], "model.init=nowhere is not there"),
        (["data.source=jsonl", "data.path={bad}"], "bad.jsonl:2: expected"),
        (["model.tokenizer=deepseek"], "has 128815 tokens but model.vocab_size=64"),
    ],
    ids=["weights", "data", "tokenizer"],
)
def test_bad_input_ends_before_anything_starts(
    layers: list[str], sentence: str, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "1+1", "answer": "2"}\n{"prompt": "1+2"}\n')
    named = [layer.format(bad=bad) for layer in layers]
    done = r1mega("rl", *SMALL, f"run.root={tmp_path}", *named, timeout_s=60)
    assert done.returncode == 1
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("run/logs/*"))


def test_fp8_weights_by_disk_are_proved_in_every_sync(base: str, tmp_path: Path) -> None:
    """A whole job: engines sample from rounded weights, and from nothing but those."""
    layers = [base, "rollout.sync=disk", "rollout.quantization=fp8", "rollout.verify=all"]
    layers += ["parallel.tp=1", "parallel.ep=1", "cluster.learner_processes_per_node=2"]
    folder = rl(tmp_path, *layers, "stage.steps=2", "stage.eval_every=0", "stage.save_every=-1")
    found = rows(folder)
    assert [row["step"] for row in found] == [1, 2]
    for row in found:
        assert row["sync/engines"] == 2
        assert row["sync/verified"] % 2 == 0
        assert row["sync/verified"] > 200  # all parameters of both
        assert row["sync/bytes"] == row["sync/minimum_bytes"]
        assert 1e-5 < row["sync/probe_difference"] < 0.1
        assert 1e-5 < row["mismatch/max"] < 1
    assert not (folder / "engine_weights").exists()  # a whole copy of the model


def test_a_checkpoint_of_another_model_is_one_sentence(straight: Path, base: str) -> None:
    done = r1mega("rl", *SMALL, base, f"run.root={straight.parent}", "model.rms_norm_eps=1e-5")
    assert done.returncode == 1
    assert "is described as another network: rms_norm_eps is 1e-06 there" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_cluster_is_not_started_on_one_machine() -> None:
    layers = ["configs/stage/r1_zero.yaml", "configs/model/deepseek_v3.yaml"]
    done = r1mega("rl", *layers, "configs/cluster/h100x256.yaml", "data.path=x", timeout_s=60)
    assert done.returncode == 1
    assert "wants 32 nodes (cluster.learner_nodes=24, engine_nodes=8)" in done.stderr
    assert "Traceback" not in done.stderr
