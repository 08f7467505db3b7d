"""Processes really end: the command, what it started, and all of it when the parent is killed."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from r1mega.system import processes

# Writes its pid and a grandchild's, which has a session of its own, then sleeps.
FAMILY = """
import os, pathlib, subprocess, sys, time
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
pathlib.Path(sys.argv[1] + ".tmp").write_text(f"{os.getpid()} {child.pid}")
os.rename(sys.argv[1] + ".tmp", sys.argv[1])
time.sleep(float(sys.argv[2]))
"""
STUBBORN = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); " + (
    "time.sleep(600)"
)


def wait_until(condition, timeout_s: float = 60.0) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def start_family(tmp_path: Path, seconds: float = 600.0) -> tuple[processes.Process, list[int]]:
    pids = tmp_path / "pids"
    argv = [sys.executable, "-c", FAMILY, str(pids), str(seconds)]
    process = processes.start(argv, name="family", log=tmp_path / "log")
    wait_until(pids.exists)
    return process, [int(pid) for pid in pids.read_text().split()]


def test_exit_code_and_log(tmp_path: Path) -> None:
    code = "import os, sys; print('out', os.environ['GREETING']); sys.exit('err')"
    process = processes.start(
        [sys.executable, "-c", code], name="talker", log=tmp_path / "a/log", env={"GREETING": "hi"}
    )
    assert process.wait(60) == 1
    assert not process.alive()
    assert sorted(processes.last_lines(process.log).splitlines()) == ["err", "out hi"]


def test_signalled_process_reports_its_signal(tmp_path: Path) -> None:
    code = "import os; os.kill(os.getpid(), 9)"
    process = processes.start([sys.executable, "-c", code], name="x", log=tmp_path / "log")
    assert process.wait(60) == 128 + signal.SIGKILL


def test_unknown_program_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="cannot start engine: there is no program 'no-such-thing'"
    ):
        processes.start(["no-such-thing"], name="engine", log=tmp_path / "log")


def test_end_reaches_grandchildren_in_other_sessions(tmp_path: Path) -> None:
    process, pids = start_family(tmp_path)
    assert all(runs(pid) for pid in pids)
    processes.end([process], grace_s=20)
    assert process.exit_code() == 128 + signal.SIGTERM
    assert not any(runs(pid) for pid in pids)


def test_what_a_finished_command_left_is_ended(tmp_path: Path) -> None:
    process, pids = start_family(tmp_path, seconds=0)
    assert process.wait(60) == 0
    assert not any(runs(pid) for pid in pids)


def test_end_kills_what_ignores_sigterm(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = processes.start([sys.executable, "-c", STUBBORN], name="x", log=log)
    wait_until(lambda: "up" in log.read_text())
    processes.end([process], grace_s=0.5)
    assert process.exit_code() == 128 + signal.SIGKILL


def test_end_is_idempotent_and_takes_dead_ones(tmp_path: Path) -> None:
    process = processes.start(["true"], name="x", log=tmp_path / "log")
    assert process.wait(60) == 0
    processes.end([process, process], grace_s=1)
    processes.end([], grace_s=1)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_all_end_when_the_parent_is_killed(tmp_path: Path, number: int) -> None:
    pids_path = tmp_path / "pids"
    family = [sys.executable, "-c", FAMILY, str(pids_path), "600"]
    code = (
        "import sys, time, pathlib; from r1mega.system import processes;"
        "processes.start(sys.argv[2:], name='x', log=pathlib.Path(sys.argv[1]));"
        "time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "log"), *family])
    try:
        wait_until(pids_path.exists)
        pids = [int(pid) for pid in pids_path.read_text().split()]
    finally:
        parent.send_signal(number)
        parent.wait(60)
    wait_until(lambda: not any(runs(pid) for pid in pids))


def test_command_ends_when_its_keeper_is_killed(tmp_path: Path) -> None:
    process, pids = start_family(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: not runs(pids[0]))
    os.kill(pids[1], signal.SIGKILL)  # nobody was left to end this one
    assert process.wait(60) == 128 + signal.SIGKILL


def test_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert "was never written" in processes.last_lines(log)
    log.write_text("")
    assert "is empty" in processes.last_lines(log)
    log.write_text("".join(f"line {i}\n" for i in range(1000)))
    assert processes.last_lines(log, 2) == "line 998\nline 999"


def test_ports() -> None:
    port = processes.free_port("127.0.0.1")
    assert processes.port_is_free("127.0.0.1", port)
    with socket.socket() as server:
        server.bind(("127.0.0.1", port))
        server.listen()
        assert not processes.port_is_free("127.0.0.1", port)
