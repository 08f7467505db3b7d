"""Run a function on several gloo ranks, each a process of its own, and collect what they return.

The function is named by module and name, takes keyword arguments that JSON can carry and returns
what JSON can carry. One failing rank ends all of them; nothing outlives the call.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from r1mega.system.processes import free_port

ROOT = Path(__file__).parents[2]


def run_ranks(
    module: str, function: str, *, world: int, timeout_s: float = 240.0, **kwargs: Any
) -> list[Any]:
    """What ``module.function(**kwargs)`` returned on every rank."""
    with TemporaryDirectory() as folder:
        port = str(free_port("127.0.0.1"))
        ranks = [
            _start(module, function, kwargs, rank, world, port, Path(folder))
            for rank in range(world)
        ]
        try:
            _wait(ranks, Path(folder), timeout_s)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world)]


def _start(
    module: str, function: str, kwargs: Any, rank: int, world: int, port: str, folder: Path
) -> subprocess.Popen[bytes]:
    env = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    with (folder / f"{rank}.log").open("wb") as log:
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                __spec__.name,
                module,
                function,
                json.dumps(kwargs),
                str(folder),
            ],
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
        )


def _wait(ranks: list[subprocess.Popen[bytes]], folder: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while any(process.poll() is None for process in ranks):
        failed = [r for r, process in enumerate(ranks) if process.poll() not in (None, 0)]
        if failed or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    for rank, process in enumerate(ranks):
        if process.poll() != 0:
            log = (folder / f"{rank}.log").read_text(errors="replace")
            if process.poll() is not None or rank == len(ranks) - 1:
                raise AssertionError(f"rank {rank} ended with {process.poll()}:\n{log[-4000:]}")


def _main() -> None:
    from importlib import import_module

    module, function, kwargs, folder = sys.argv[1:]
    result = getattr(import_module(module), function)(**json.loads(kwargs))
    (Path(folder) / f"{os.environ['RANK']}.json").write_text(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads need not be joined


if __name__ == "__main__":
    _main()
