"""The launcher of ``r1mega selftest``: the user's configuration in small, a job like any other."""

import shutil
from pathlib import Path
from tempfile import mkdtemp

from r1mega.cluster import job
from r1mega.config.checks import check
from r1mega.config.scaled import changes, scale_down
from r1mega.config.schema import Config
from r1mega.run.directory import RunDirectory

MAX_PROCESSES = 8  # each imports megatron-core: seconds of a core


def run(config: Config) -> int:
    """Exit status 0 when layout and engine compute what one process computes."""
    root, code = Path(mkdtemp(prefix="r1mega-selftest-")), 0
    try:
        code = _run_small(config, root)
    finally:  # only the logs of a failure are worth keeping, not those of Ctrl-C
        if code == 0:
            shutil.rmtree(root)
    return code


def _run_small(config: Config, root: Path) -> int:
    gpus = _visible_gpus() if config.cluster.backend == "cuda" else 0
    processes = min(gpus, MAX_PROCESSES) if gpus else MAX_PROCESSES
    small = scale_down(config, processes=processes, cuda=gpus > 0, root=str(root))
    check(small)
    if config.cluster.backend == "cuda" and not gpus:
        print("no GPU here: what needs one gives way to what it replaces")
    for line in changes(config, small):
        print(line, flush=True)
    return job.run("selftest", small, [str(RunDirectory(root / small.name).config_path)])


def _visible_gpus() -> int:
    import torch

    return torch.cuda.device_count()
