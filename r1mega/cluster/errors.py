"""What ends a job for a reason that the user should read."""

from pathlib import Path


class JobFailed(Exception):
    """One sentence, and the log whose last lines tell more."""

    def __init__(self, message: str, log: Path | None = None) -> None:
        super().__init__(message)
        self.log = log
