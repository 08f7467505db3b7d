"""The process behind ``workers.WorkerPool``: reads one JSON line, answers one JSON line, until EOF.

Started as a script with nothing but the standard library, so a worker costs what its setup function
imports and no more. The kernel keeps the limits, so no code run by an item can outstay them:
ITIMER_PROF ends the process (SIGPROF) once an item has used its CPU seconds, ITIMER_REAL (SIGALRM)
its wall seconds, RLIMIT_AS bounds memory. An idle worker ends when its parent does.
"""

import importlib
import json
import os
import resource
import select
import signal
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

PARENT_CHECK_S = 5.0


def serve() -> None:
    # Whatever a library prints must not look like an answer: answers leave by a private copy.
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    parent = os.getppid()
    clocks = (signal.SIGPROF, signal.SIGALRM)
    for clock in clocks:
        signal.signal(clock, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, clocks)  # the mask of the parent's thread is ours
    start = json.loads(requests.readline())
    _arm(0.0, start["wall_seconds"])
    work = _prepare(start)
    _arm(0.0, 0.0)
    _send(answers, {"ready": True})
    while line := _next_line(requests, parent):
        _arm(start["cpu_seconds"], start["wall_seconds"])
        message = _answer(work, json.loads(line))
        _arm(0.0, 0.0)
        _send(answers, message)
        if "overrun" in message:
            return  # memory ran out once: what is left of this process is not worth trusting


def _prepare(start: dict[str, Any]) -> Callable[[Any], Any]:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (start["memory_bytes"], start["memory_bytes"]))
    sys.path[:] = start["path"]
    module = importlib.import_module(start["module"])
    work: Callable[[Any], Any] = getattr(module, start["function"])()
    return work


def _answer(work: Callable[[Any], Any], item: Any) -> dict[str, Any]:
    try:
        return {"value": work(item)}
    except MemoryError:
        return {"overrun": "memory"}
    except RecursionError:
        return {"overrun": "recursion depth"}


def _arm(cpu_seconds: float, wall_seconds: float) -> None:
    """Start both clocks of an item; zeros stop them."""
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    signal.setitimer(signal.ITIMER_REAL, wall_seconds)


def _next_line(requests: BinaryIO, parent: int) -> bytes:
    """The next request, or nothing at EOF or once the parent is gone.

    EOF alone is not enough: a process forked by the parent may hold the pipe open.
    """
    while not select.select([requests], [], [], PARENT_CHECK_S)[0]:
        if os.getppid() != parent:
            return b""
    return requests.readline()


def _send(answers: BinaryIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message).encode() + b"\n")
    answers.flush()


if __name__ == "__main__":
    serve()
