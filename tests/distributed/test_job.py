"""The launcher: nothing stays behind however it ends, engines come back, failures are sentences."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from r1mega.config import load
from r1mega.model.hf_config import model_from_hf

REPOSITORY = Path(__file__).resolve().parents[2]
LAYERS = [
    "name=job",
    "model.num_hidden_layers=2",
    "data.template=none",
    "data.max_prompt_tokens=32",
    "rollout.max_response_tokens=32",
    "rollout.context_tokens=64",
    "rollout.engines=2",
    "rollout.max_running_requests=4",
    "learner.precision=fp32",
]
SLEEP = "import time; time.sleep(600)"


class Launch:
    """A launcher in a process of its own."""

    def __init__(self, tmp_path: Path, script: str, *layers: str) -> None:
        self.folder = tmp_path / "job"
        path = tmp_path / "learner.py"
        path.write_text(textwrap.dedent(script))
        root = f"run.root={tmp_path}"
        self.argv = [sys.executable, "-m", "tests.distributed.job_driver", str(path)]
        self.argv += [*LAYERS, root, *layers]
        self.errors = tmp_path / "errors"
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                self.argv,
                cwd=REPOSITORY,
                env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
                stdout=subprocess.PIPE,
                stderr=errors,
            )

    def entries(self) -> dict[str, dict[str, object]]:
        found = {}
        for path in (self.folder / "fleet").glob("*.json"):
            try:
                found[path.stem] = json.loads(path.read_text())
            except FileNotFoundError:
                continue
        return found

    def processes(self) -> set[int]:
        """All live descendants of the launcher."""
        return descendants(self.process.pid)

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
        wait_for(lambda: condition() or self.process.poll() is not None, timeout_s)
        assert self.process.poll() is None, self.errors.read_text()

    def end(self) -> tuple[int, str, str]:
        """Exit code, standard output and standard error, once it has ended."""
        output, _ = self.process.communicate(timeout=120)
        return self.process.returncode, output.decode(), self.errors.read_text()


@pytest.fixture
def launches() -> Iterator[list[Launch]]:
    started: list[Launch] = []
    yield started
    for launch in started:
        if launch.process.poll() is None:
            launch.process.kill()
        launch.process.communicate(timeout=60)


def wait_for(condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


def parents() -> dict[int, int]:
    table = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if fields[0] not in "ZX":
            table[int(path.parent.name)] = int(fields[1])
    return table


def descendants(pid: int) -> set[int]:
    table = parents()
    found: set[int] = set()
    level = {pid}
    while level:
        level = {child for child, parent in table.items() if parent in level}
        found |= level
    return found


def all_gone(pids: set[int]) -> bool:
    return not pids & parents().keys()


WHOLE_RUN = """
    import pathlib, sys
    from r1mega.rollout.fleet import Fleet
    from r1mega.rollout.router import RouterClient
    import json, torch
    from safetensors.torch import load_file
    from r1mega.config import load
    from r1mega.records import Prompt, SampleRequest, Sampling
    from r1mega.rollout.sampler import HttpSampler
    from r1mega.weights.names import hf_shapes
    from tests.distributed.publishing import broadcast, publisher
    folder = pathlib.Path(sys.argv[1])
    model = load([str(folder / "config.yaml")]).model
    url = json.loads((folder / "fleet/router.json").read_text())["url"]
    fleet = Fleet(folder / "fleet", RouterClient(url), logs=folder / "logs")
    fleet.wait_ready(2, 120)
    zeros = lambda: ((n, torch.zeros(s)) for n, s in hf_shapes(model).items())
    report = publisher(fleet, broadcast(zeros)).publish(1)
    prompt = Prompt(uid="p", text="", token_ids=(3, 4), question="", answer="")
    asked = [SampleRequest(prompt=prompt, index=i, seed=i) for i in range(4)]
    sampler = HttpSampler(url=url, concurrency=4, timeout_s=60, max_retries=3, expected_version=1)
    samples = sampler(asked, Sampling(temperature=1.0, max_tokens=4, stop_token_ids=()))
    print("drew", len(samples), "from", report.engines)
"""


def test_whole_run_and_its_files(tmp_path: Path, launches: list[Launch]) -> None:
    launches.append(launch := Launch(tmp_path, WHOLE_RUN))
    code, output, errors = launch.end()
    assert code == 0, errors
    assert output.strip() == "drew 4 from ('engine-0', 'engine-1')"
    config = load([str(launch.folder / "config.yaml")])
    assert config.rollout.engines == 2
    written = json.loads((launch.folder / "engine_model" / "config.json").read_text())
    assert model_from_hf(written) == config.model
    assert (launch.folder / "engine_model" / "tokenizer.json").exists()
    assert launch.entries() == {}
    logs = {path.name for path in (launch.folder / "logs").glob("*.log")}
    assert {"router.log", "engine-0.log", "engine-1.log", "learner.log"} <= logs


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_stays_when_the_launcher_ends(
    tmp_path: Path, launches: list[Launch], number: int
) -> None:
    launches.append(launch := Launch(tmp_path, SLEEP))
    launch.wait_for(lambda: len(launch.entries()) == 3)
    pids = launch.processes()
    assert len(pids) == 8  # router, two engines, learner: each with its keeper
    launch.process.send_signal(number)
    launch.process.wait(60)
    wait_for(lambda: all_gone(pids), timeout_s=60)
    assert launch.process.returncode == (-9 if number == signal.SIGKILL else 128 + number)


def test_learner_failure_ends_all_with_its_code_and_last_words(
    tmp_path: Path, launches: list[Launch]
) -> None:
    launches.append(launch := Launch(tmp_path, "raise SystemExit('the loss is NaN')"))
    code, _, errors = launch.end()
    assert code == 1
    assert "the learner ended with exit code 1: the end of" in errors
    assert "the loss is NaN" in errors
    assert launch.entries() == {}


def test_dead_engine_comes_back_elsewhere(tmp_path: Path, launches: list[Launch]) -> None:
    launches.append(launch := Launch(tmp_path, SLEEP))
    launch.wait_for(lambda: len(launch.entries()) == 3)
    before = launch.entries()["engine-1"]
    os.kill(int(str(before["pid"])), signal.SIGKILL)
    launch.wait_for(lambda: launch.entries().get("engine-1", before) != before)
    after = launch.entries()["engine-1"]
    assert after["incarnation"] == 1
    assert after["url"] != before["url"]


def test_frozen_engine_is_replaced(tmp_path: Path, launches: list[Launch]) -> None:
    launches.append(launch := Launch(tmp_path, SLEEP, "rollout.engine_silence_timeout_s=10"))
    launch.wait_for(lambda: len(launch.entries()) == 3)
    before = launch.entries()["engine-1"]
    frozen = descendants(int(str(before["pid"])))
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    launch.wait_for(lambda: launch.entries().get("engine-1", before) != before)
    assert all_gone(frozen)
    assert "engine-1 has not answered for 1" in launch.errors.read_text()


def test_engine_that_keeps_dying_is_a_clear_end(tmp_path: Path, launches: list[Launch]) -> None:
    launches.append(launch := Launch(tmp_path, SLEEP, "rollout.max_restarts=0"))
    launch.wait_for(lambda: len(launch.entries()) == 3)
    os.kill(int(str(launch.entries()["engine-0"]["pid"])), signal.SIGKILL)
    code, _, errors = launch.end()
    assert code == 1
    assert "engine-0 was ended by SIGKILL (exit code 137), perhaps for lack of memory" in errors
    assert "after 0 restarts (rollout.max_restarts=0)" in errors


def test_engine_that_does_not_come_up_is_a_clear_end(
    tmp_path: Path, launches: list[Launch]
) -> None:
    launches.append(launch := Launch(tmp_path, SLEEP, "rollout.engine_start_timeout_s=0.01"))
    code, _, errors = launch.end()
    assert code == 1
    assert re.search(r"engine-\d at http://\S+ did not answer within 0 s", errors)


def test_router_death_is_a_clear_end(tmp_path: Path, launches: list[Launch]) -> None:
    launches.append(launch := Launch(tmp_path, SLEEP))
    launch.wait_for(lambda: "router" in launch.entries())
    os.kill(int(str(launch.entries()["router"]["pid"])), signal.SIGKILL)
    code, _, errors = launch.end()
    assert code == 1
    assert "the router was ended by SIGKILL (exit code 137)" in errors


@pytest.mark.parametrize("key", ["master_port", "router_port"])
def test_taken_port_is_refused_before_anything_starts(
    tmp_path: Path, launches: list[Launch], key: str
) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        launches.append(launch := Launch(tmp_path, SLEEP, f"cluster.{key}={port}"))
        code, _, errors = launch.end()
    assert code == 1
    assert f"cluster.{key}={port} is taken on 127.0.0.1" in errors
    assert not launch.folder.exists()


def test_second_launcher_on_one_run_is_refused(tmp_path: Path, launches: list[Launch]) -> None:
    launches.append(first := Launch(tmp_path, SLEEP))
    first.wait_for(lambda: "router" in first.entries())
    launches.append(second := Launch(tmp_path, SLEEP))
    code, _, errors = second.end()
    assert code == 1
    assert f"another launcher works on {first.folder}" in errors
    assert first.process.poll() is None
