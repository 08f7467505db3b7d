"""What ends a job for a reason that the user should read."""

import re
from dataclasses import dataclass
from pathlib import Path

from r1mega.system import processes
from r1mega.system.processes import Process


class JobFailed(Exception):
    """One sentence; the end of a log may follow it."""


def learner_failure(learner: Process, code: int, logs: Path) -> str:
    """Which rank of the learner failed first, how it ended and what it said last."""
    failed = failed_rank(learner.log, logs)
    if failed is None:
        return processes.obituary("the learner", code, learner.log)
    who = f"rank {failed.rank} of the learner"
    return processes.obituary(who, failed.exit_code, failed.log)


@dataclass(frozen=True, slots=True)
class FailedRank:
    """The rank whose end ended the others."""

    rank: int
    exit_code: int
    log: Path


def failed_rank(summary: Path, logs: Path) -> FailedRank | None:
    """The rank that failed first, by torch.distributed.run's summary, and the log to read."""
    text = summary.read_text(errors="replace") if summary.exists() else ""
    causes = re.findall(
        r"Root Cause.*?rank\s*:\s*(\d+) \(local_rank: (\d+)\)\s*exitcode\s*:\s*(-?\d+)",
        text,
        re.DOTALL,
    )
    if not causes:
        return None
    rank, local_rank, code = (int(word) for word in causes[-1])
    attempts = sorted(logs.glob(f"*/attempt_*/{local_rank}"), key=lambda path: path.stat().st_mtime)
    written = [path / name for path in attempts[-1:] for name in ("stderr.log", "stdout.log")]
    telling = [path for path in written if path.exists() and path.stat().st_size > 0]
    log = telling[0] if telling else summary
    return FailedRank(rank, code if code >= 0 else 128 - code, log)
