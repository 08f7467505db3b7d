"""WorkerPool: real processes that hang, crash, eat memory and outlive nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from r1mega.system.workers import Limits, WorkerPool

REPOSITORY = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.timeout(180)


def misbehave() -> Callable[[Any], Any]:
    """The work under test: does to its process what the item says."""
    actions: dict[str, Callable[[Any], Any]] = {
        "echo": lambda value: value,
        "square": lambda number: number * number,
        "spin": lambda _: sum(1 for _ in iter(int, 1)),
        "spin in C": lambda _: 9**9**9,
        "sleep": time.sleep,
        "exit": leave,
        "int": int,
        "signal": lambda number: os.kill(os.getpid(), number),
        "eat": lambda size: len(bytearray(size)),
        "recurse": lambda _: actions["recurse"](_),
        "print": lambda text: print(text, flush=True),
        "pid": lambda _: os.getpid(),
        "modules": lambda names: [name for name in names if name in sys.modules],
        "environment": lambda _: sorted(os.environ),
    }
    return lambda item: actions[item[0]](item[1])


def leave(status: int) -> None:
    print("about to leave", file=sys.stderr)
    os._exit(status)


def fail_to_start() -> Callable[[Any], Any]:
    raise ModuleNotFoundError("No module named 'grader'")


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    limits = Limits(cpu_seconds=0.5, wall_seconds=60, memory_bytes=512 << 20)
    with closing(WorkerPool(misbehave, num_workers=2, limits=limits)) as pool:
        yield pool


def test_values_come_back_in_order(pool: WorkerPool) -> None:
    results = pool.map([["square", n] for n in range(100)])
    assert [result.value for result in results] == [n * n for n in range(100)]
    assert {result.outcome for result in results} == {"value"}
    assert pool.map([]) == []


@pytest.mark.parametrize("action", ["spin", "spin in C"])
def test_a_hanging_item_is_stopped_and_the_others_are_right(pool: WorkerPool, action: str) -> None:
    items = [["square", 3], [action, 0], ["square", 4], [action, 0], ["square", 5]]
    results = pool.map(items)
    assert [result.value for result in results] == [9, None, 16, None, 25]
    assert [results[i].outcome for i in (1, 3)] == ["overrun", "overrun"]
    assert results[1].detail == "0.5 CPU seconds"


def test_waiting_is_not_charged_as_cpu_time(pool: WorkerPool) -> None:
    assert pool.map([["sleep", 1.0]])[0].outcome == "value"


@pytest.mark.parametrize(
    ("item", "cause"),
    [
        (["exit", 3], "exit status 3: about to leave"),
        (["signal", signal.SIGSEGV], "SIGSEGV"),
        (["int", "seven"], "ValueError: invalid literal"),
    ],
)
def test_a_crash_is_an_error_and_only_its_own(pool: WorkerPool, item: Any, cause: str) -> None:
    results = pool.map([["square", 6], item, ["square", 7]])
    assert [result.outcome for result in results] == ["value", "error", "value"]
    assert [results[0].value, results[2].value] == [36, 49]
    assert cause in results[1].detail


def test_a_memory_hog_and_endless_recursion_are_overruns(pool: WorkerPool) -> None:
    results = pool.map([["eat", 1 << 34], ["recurse", 0], ["eat", 1 << 20]])
    assert [result.outcome for result in results] == ["overrun", "overrun", "value"]
    assert results[0].detail == "memory (limit 512 MiB)"
    assert results[2].value == 1 << 20


def test_huge_input_never_reaches_a_worker(pool: WorkerPool) -> None:
    results = pool.map([["echo", "x" * 1_000_000], ["echo", "x" * 30_000]])
    assert results[0].outcome == "overrun"
    assert "1000013 bytes (limit 32768)" in results[0].detail
    assert results[1].value == "x" * 30_000


def test_any_text_survives_the_pipe(pool: WorkerPool) -> None:
    texts = ["", "\n\r\0", "\ud800", "日本\u2028", '"}{', "<script>"]
    assert [result.value for result in pool.map([["echo", text] for text in texts])] == texts
    assert pool.map([["print", "noise"]])[0].outcome == "value"  # stray output is no answer


def test_a_worker_is_bare(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pool.map([["modules", ["torch", "numpy", "r1mega.config"]]])[0].value == []
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    with closing(WorkerPool(misbehave, num_workers=1, limits=Limits(cpu_seconds=5))) as fresh:
        assert "WANDB_API_KEY" not in fresh.map([["environment", 0]])[0].value


def test_workers_are_recycled() -> None:
    limits = Limits(cpu_seconds=5, items_per_worker=3)
    with closing(WorkerPool(misbehave, num_workers=1, limits=limits)) as pool:
        pids = [result.value for result in pool.map([["pid", 0]] * 9)]
    assert [len(set(pids[i : i + 3])) for i in (0, 3, 6)] == [1, 1, 1]
    assert len(set(pids)) == 3


def test_wall_limit_is_the_machinerys_fault() -> None:
    limits = Limits(cpu_seconds=5, wall_seconds=2)
    with closing(WorkerPool(misbehave, num_workers=1, limits=limits)) as pool:
        result = pool.map([["sleep", 3600]])[0]
    assert (result.outcome, result.detail) == ("error", "no answer in 2 s")


def test_an_idle_worker_that_died_is_replaced() -> None:
    with closing(WorkerPool(misbehave, num_workers=1, limits=Limits(cpu_seconds=5))) as pool:
        pid = pool.map([["pid", 0]])[0].value
        os.kill(pid, signal.SIGKILL)
        result = pool.map([["square", 8]])[0]
    assert (result.outcome, result.value) == ("value", 64)


def test_failing_to_start_says_why() -> None:
    with (
        closing(WorkerPool(fail_to_start, num_workers=2, limits=Limits(cpu_seconds=5))) as pool,
        pytest.raises(RuntimeError, match=r"failed to start 3 times in a row.*No module named"),
    ):
        pool.map([1])


def test_bad_construction() -> None:
    with pytest.raises(ValueError, match="num_workers=0"):
        WorkerPool(misbehave, num_workers=0, limits=Limits(cpu_seconds=1))
    with pytest.raises(ValueError, match="importable module"):
        WorkerPool(lambda: str, num_workers=1, limits=Limits(cpu_seconds=1))


def test_close_ends_the_processes() -> None:
    pool = WorkerPool(misbehave, num_workers=2, limits=Limits(cpu_seconds=5))
    pids = {result.value for result in pool.map([["pid", 0]] * 20)}
    pool.close()
    pool.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    with pytest.raises(RuntimeError, match="closed"):
        pool.map([["pid", 0]])


def test_workers_end_with_a_killed_parent() -> None:
    program = """
import json, os, signal, sys
from r1mega.system.workers import Limits, WorkerPool
from test_workers import misbehave
pool = WorkerPool(misbehave, num_workers=1, limits=Limits(cpu_seconds=5))
print(json.dumps(pool.map([["pid", 0]])[0].value), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    path = os.pathsep.join([str(REPOSITORY), str(Path(__file__).parent)])
    parent = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        timeout=120,
        check=False,
    )
    pid = json.loads(parent.stdout)
    for _ in range(600):
        if not _running(pid):
            break
        time.sleep(0.1)
    assert not _running(pid)


def _running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # whoever inherits an orphan may take its time to reap it
