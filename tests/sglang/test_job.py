"""GRPO by the command line with two real SGLang servers behind the real router.

What engines return is compared with what the learner computes for the same tokens: ``mismatch/max``
is the largest difference of a log-prob in a step, whose weights came by the sync before it.
"""

import json
import os
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from r1mega.config import load
from r1mega.rollout.control import API_KEY
from tests.distributed.test_failures import Run, rows
from tests.distributed.test_job import all_gone, descendants, wait_for
from tests.sglang.servers import ENVIRONMENT, PYTHON

JOB = [
    "rollout.engine=sglang",
    f"rollout.sglang_python={PYTHON}",
    f"rollout.sglang_env={json.dumps(ENVIRONMENT)}",
    "cluster.learner_processes_per_node=2",
    "stage.eval_every=0",
    "stage.save_every=-1",
    "model.initializer_range=0.08",
    "algorithm.entropy_coef=0.1",  # a random network earns no reward: something to learn from
]
pytestmark = pytest.mark.timeout(900)  # two servers start on whatever cores there are
KEY = "a-key-that-nobody-else-may-see"


@pytest.fixture
def run(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Run]:
    started = Run(tmp_path, *JOB, *request.param)
    yield started
    if started.process.poll() is None:
        started.process.send_signal(signal.SIGTERM)
        started.process.wait(60)


def assert_equal_logprobs(run: Run, steps: int) -> list[dict[str, Any]]:
    """... after every sync, of weights that change, and each sample from the version it says."""
    found = rows(run.folder)
    assert [row["step"] for row in found] == list(range(1, steps + 1)), run.said()
    assert max(row["mismatch/max"] for row in found) < 1e-5
    assert min(row["learner/grad_norm"] for row in found) > 1e-3
    assert {row["version"] for row in found} == set(range(steps))
    for line in (run.folder / "samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        assert [span[0] for span in sample["versions"]] == [sample["step"] - 1], sample
    return found


# --- How weights get there, and which networks --------------------------------------------------

QWEN2 = ["configs/model/tiny_qwen2.yaml", "parallel.tp=2"]
ONE_OF_TWO_RANKS = [
    "rollout.engines=1",
    'rollout.sglang_args=[--tp-size, "2"]',
    "model.moe_intermediate_size=64",  # 32 for each rank: SGLang widens less on CPUs
    "rollout.verify=all",
]
WAYS = {
    "broadcast, tensor parallel": ["parallel.tp=2"],
    "broadcast, qwen2 with a tied head": QWEN2,
    "disk, pipeline parallel": ["parallel.pp=2", "rollout.sync=disk", "rollout.verify=all"],
    "p2p, expert parallel": ["parallel.ep=2", "rollout.sync=p2p", "rollout.verify=all"],
    "broadcast, to two ranks": ["parallel.tp=2", *ONE_OF_TWO_RANKS],
    "p2p, to two ranks": ["parallel.pp=2", "rollout.sync=p2p", *ONE_OF_TWO_RANKS],
}


@pytest.mark.parametrize(
    "run", [[*way, "stage.steps=3"] for way in WAYS.values()], ids=WAYS, indirect=True
)
def test_engines_compute_what_the_learner_computes(run: Run) -> None:
    assert run.end() == 0, run.said()
    found = assert_equal_logprobs(run, steps=3)
    for row in found:
        assert row["sync/engines"] == load([str(run.folder / "config.yaml")]).rollout.engines
        assert row["sync/verified"] > 0  # checksums that were predicted and found, over both


# --- A job that loses an engine, with a key and the experts of real routers ----------------------


def status(url: str, *, method: str = "GET", key: str | None = None) -> int:
    request = urllib.request.Request(url, method=method)
    if method == "POST":
        request.data = b"{}"
        request.add_header("Content-Type", "application/json")
    if key is not None:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def assert_key_is_asked_for(run: Run) -> None:
    entries = [json.loads(path.read_text()) for path in (run.folder / "fleet").glob("*.json")]
    urls = {entry.get("name", "router"): entry["url"] for entry in entries}
    engine, router = urls["engine-1"], urls["router"]
    for route in ("/generate", "/begin_weight_update", "/update_weights_from_disk"):
        assert status(engine + route, method="POST") == 401
        assert status(engine + route, method="POST", key="another") == 401
    assert status(engine + "/server_info") == 401
    assert status(engine + "/server_info", key=KEY) == 200
    assert status(router + "/workers") == 401
    assert status(router + "/generate", method="POST") == 401


def assert_key_is_hidden(run: Run) -> None:
    for pid in descendants(run.process.pid):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except FileNotFoundError:
            continue
        assert KEY.encode() not in command
    for path in run.folder.rglob("*"):
        if path.is_file() and path.parent != run.folder / "secrets":
            assert KEY.encode() not in path.read_bytes(), path


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY, KEY)


HURT = ["parallel.tp=2", "parallel.ep=2", "stage.steps=8", "algorithm.replay_routing=true"]


@pytest.mark.usefixtures("key")
@pytest.mark.parametrize("run", [HURT], ids=["tp2 ep2"], indirect=True)
def test_a_killed_server_is_replaced_and_its_key_is_kept(run: Run) -> None:
    wait_for(lambda: run.process.poll() is not None or len(rows(run.folder)) >= 2, 400)
    assert run.process.poll() is None, run.said()
    assert_key_is_asked_for(run)
    assert_key_is_hidden(run)
    started = descendants(run.process.pid)
    first = run.fleet_pid("engine-0")
    os.kill(first, signal.SIGKILL)
    # The learner is faster than a server starts: it stops, so that there are steps left for both.
    learners = run.pids("r1mega worker")
    for pid in learners:
        os.kill(pid, signal.SIGSTOP)
    try:
        wait_for(lambda: _registered_anew(run, first), timeout_s=400)
    finally:
        for pid in learners:
            os.kill(pid, signal.SIGCONT)
    assert run.end() == 0, run.said()
    wait_for(lambda: all_gone(started))  # the killed server's own processes, too
    assert "engine-0 was ended by SIGKILL" in run.said()
    found = assert_equal_logprobs(run, steps=8)
    assert found[-1]["sync/engines"] == 2
    assert all(row["mismatch/routing"] == 0 for row in found)
    assert not (run.folder / "secrets").exists()
    assert_key_is_hidden(run)


def _registered_anew(run: Run, first: int) -> bool:
    path = run.folder / "fleet/engine-0.json"
    return path.exists() and json.loads(path.read_text())["pid"] != first
