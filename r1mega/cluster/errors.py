"""What ends a job for a reason that the user should read."""

import re
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

from r1mega.system import processes
from r1mega.system.processes import Process

_FULL_DISK_BYTES = 1 << 20


class JobFailed(Exception):
    """One sentence; the end of a log may follow it."""


def learner_failure(learner: Process, code: int, logs: Path) -> str:
    """Which rank of the learner failed first, how it ended and what it said last."""
    failed = failed_rank(learner.log, logs)
    if failed is None:
        text = processes.obituary("the learner", code, learner.log)
    else:
        who = f"rank {failed.rank} of the learner"
        text = processes.obituary(who, failed.exit_code, failed.log)
    return text + note_on_space(logs)


def note_on_space(folder: Path) -> str:
    """On a full disk a process that ends cannot write why."""
    free = shutil.disk_usage(folder).free if folder.exists() else _FULL_DISK_BYTES
    if free >= _FULL_DISK_BYTES:
        return ""
    return f"\n(the disk that holds {folder} is full, {free} bytes are left: make room)"


@dataclass(frozen=True, slots=True)
class FailedRank:
    """The rank whose end ended the others."""

    rank: int
    exit_code: int
    log: Path


def failed_rank(summary: Path, logs: Path) -> FailedRank | None:
    """The rank that failed first, by torch.distributed.run's summary and the ranks' last words.

    Its "root cause" is only the failure it noticed first: ranks that lost their peer fail within
    milliseconds, but they write after it. Those that it ended itself (SIGTERM) failed of nothing.
    """
    text = summary.read_text(errors="replace") if summary.exists() else ""
    entries = re.findall(
        r"rank\s*:\s*(\d+) \(local_rank: (\d+)\)\s*exitcode\s*:\s*(-?\d+)",
        text.rpartition(" FAILED\n")[2],
    )
    failed = [
        FailedRank(int(rank), int(code) if int(code) >= 0 else 128 - int(code), log)
        for rank, local_rank, code in entries
        if int(code) not in (-signal.SIGTERM, 128 + signal.SIGTERM)
        for log in [_rank_log(logs, local_rank) or summary]
    ]
    return min(failed, key=lambda rank: rank.log.stat().st_mtime_ns, default=None)


def _rank_log(logs: Path, local_rank: str) -> Path | None:
    """What the rank wrote in its newest life, if it did."""
    attempts = sorted(logs.glob(f"*/attempt_*/{local_rank}"), key=lambda path: path.stat().st_mtime)
    written = [path / name for path in attempts[-1:] for name in ("stderr.log", "stdout.log")]
    return next((path for path in written if path.exists() and path.stat().st_size > 0), None)
