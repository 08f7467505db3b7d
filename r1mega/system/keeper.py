"""Runs one command, and sees to it that nothing of it is left: ``keeper.py PARENT_PID COMMAND ...``

The keeper is a process between a parent and the command it started. It ends with the command's
exit code (128 + signal), after killing whatever the command left running, also processes that moved
to sessions of their own. When the parent dies, even by SIGKILL, or on SIGTERM, the command gets
SIGTERM and ``GRACE_S`` seconds; a second SIGTERM cuts them short. When the keeper is killed, so is
the command. It stands alone and imports the standard library only (``python -I -S``), so that it
starts in milliseconds.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path
from types import FrameType

GRACE_S = 120  # a learner may be writing a checkpoint
_SET_PARENT_DEATH_SIGNAL = 1
_SET_CHILD_SUBREAPER = 36  # orphaned descendants become our children instead of init's


def keep(parent: int, argv: list[str]) -> int:
    """Run ``argv`` and return its exit code once no descendant is left."""
    _prctl(_SET_CHILD_SUBREAPER, 1)
    child = _start(argv)

    def on_signal(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, on_second_signal)
        signal.alarm(GRACE_S)
        os.kill(child, signal.SIGTERM)

    def on_second_signal(number: int, frame: FrameType | None) -> None:
        _kill_children()

    signal.signal(signal.SIGALRM, on_second_signal)
    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the line above took effect
        os.kill(os.getpid(), signal.SIGTERM)

    status = _wait_for(child)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the only child we would signal is gone
    signal.alarm(0)
    _end_the_rest()
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _start(argv: list[str]) -> int:
    keeper = os.getpid()
    child = os.fork()
    if child:
        return child
    try:
        _prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() == keeper:
            os.execvp(argv[0], argv)
    except OSError as error:
        sys.stderr.write(f"cannot run {argv[0]}: {error.strerror}\n")
        sys.stderr.flush()
    os._exit(127)


def _wait_for(child: int) -> int:
    while True:  # adopted orphans are reaped on the way
        pid, status = os.wait()
        if pid == child:
            return status


def _end_the_rest() -> None:
    """Killing a child hands us its children; repeat until there are none."""
    while True:
        _kill_children()
        try:
            os.wait()
        except ChildProcessError:
            return


def _kill_children() -> None:
    for pid in _children():
        os.kill(pid, signal.SIGKILL)  # a child of ours cannot be reused before we wait for it


def _children() -> list[int]:
    own = os.getpid()
    return [int(path.name) for path in Path("/proc").glob("[0-9]*") if _parent_of(path) == own]


def _parent_of(path: Path) -> int | None:
    try:
        return int((path / "stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


if __name__ == "__main__":
    sys.exit(keep(int(sys.argv[1]), sys.argv[2:]))
