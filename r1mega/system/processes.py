"""Start processes, look at them, and end exactly those.

Every process runs under a keeper (``keeper.py``) in a session of its own: whatever it started ends
with it, and all of it ends when we do, also when we are killed with SIGKILL.
"""

import ipaddress
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from r1mega.system import keeper

SENTENCE = "r1mega: "  # begins the last line of a process of ours that ended badly
_SERVER_PORTS = range(10240, 16000)


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """A started process. ``pid`` is its keeper's: a signal to it reaches the process."""

    name: str
    log: Path
    _handle: subprocess.Popen[bytes] = field(repr=False)

    @property
    def pid(self) -> int:
        return self._handle.pid

    def exit_code(self) -> int | None:
        """None while it runs; 128 + n when signal n ended it."""
        code = self._handle.poll()
        return code if code is None or code >= 0 else 128 - code

    def alive(self) -> bool:
        return self.exit_code() is None

    def wait(self, timeout_s: float) -> int | None:
        """The exit code, or None when it still runs after ``timeout_s``."""
        try:
            self._handle.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        return self.exit_code()


def start(
    argv: Sequence[str],
    *,
    name: str,
    log: Path,
    env: Mapping[str, str] | None = None,
    inherit_stdout: bool = False,
) -> Process:
    """Run ``argv`` with output appended to ``log``; ``env`` adds to our environment.

    ``inherit_stdout`` leaves standard output on our terminal. The process ends with the *thread*
    that called this, because Linux signals the death of a parent per thread: call it from one that
    lives as long as the process should.
    """
    if shutil.which(argv[0]) is None:
        raise ValueError(f"cannot start {name}: there is no program {argv[0]!r}")
    keeper_argv = [sys.executable, "-I", "-S", str(Path(keeper.__file__)), str(os.getpid())]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        handle = subprocess.Popen(
            [*keeper_argv, *argv],
            stdin=subprocess.DEVNULL,
            stdout=None if inherit_stdout else output,
            stderr=output,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
    return Process(name=name, log=log, _handle=handle)


def end(processes: Sequence[Process], *, grace_s: float) -> None:
    """SIGTERM, ``grace_s`` seconds for all of them together, then SIGKILL; returns at their end."""
    for number in (signal.SIGTERM, signal.SIGTERM):  # the second makes a keeper kill its process
        running = [process for process in processes if process.alive()]
        for process in running:
            process._handle.send_signal(number)
        deadline = time.monotonic() + grace_s
        for process in running:
            process.wait(max(0.0, deadline - time.monotonic()))
    for process in processes:
        if process.alive():  # the keeper itself is stuck, for example stopped by SIGSTOP
            process._handle.kill()
            process.wait(grace_s)


def how_it_ended(code: int | None) -> str:
    """An exit code as ``exit_code`` gives it, in words."""
    number = (code or 0) - 128
    if number not in set(signal.Signals):
        return f"ended with exit code {code}"
    hint = ", perhaps for lack of memory" if number == signal.SIGKILL else ""
    return f"was ended by {signal.Signals(number).name} (exit code {code}){hint}"


def obituary(who: str, code: int | None, log: Path, *, note: str = "") -> str:
    """How it ended and what it said last; nothing when it was killed and could say nothing."""
    ended = f"{who} {how_it_ended(code)}{note}"
    if code in (128 + signal.SIGKILL, 128 + signal.SIGTERM):
        return f"{ended}\n(its log is {log})"
    return f"{ended}: {last_words(log)}"


def last_words(path: Path) -> str:
    """The sentence a process of ours ended with, else the end of its log."""
    text = last_lines(path, 60)
    _, found, sentence = f"\n{text}".rpartition(f"\n{SENTENCE}")
    if found:
        return f"{sentence}\n(its log is {path})"
    return f"the end of {path}:\n{last_lines(path)}"


def last_lines(path: Path, count: int = 20) -> str:
    """The end of a log, for an error message; says so when there is nothing."""
    if not path.exists():
        return f"({path} was never written)"
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 400 * count))
        lines = file.read().decode(errors="replace").splitlines()
    return "\n".join(lines[-count:]) or f"({path} is empty)"


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on at the moment; the next asker gets another one.

    It lies below the ports that the system gives to outgoing connections, so that none of those
    takes it before the server for which it is meant has started.
    """
    candidates = random.SystemRandom().sample(_SERVER_PORTS, 100)
    for port in candidates:
        if port_is_free(host, port):
            return port
    raise OSError(f"{host} has no free port among 100 tried in {_SERVER_PORTS}")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def port_is_free(host: str, port: int) -> bool:
    """Whether a server could listen on ``host:port`` now."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
        try:
            server.bind((host, port))
        except OSError:
            return False
        return True
