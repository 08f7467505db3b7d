"""The report of a run (``r1mega report``): report.html and the closing table."""

from pathlib import Path

from rich.console import Console

from r1mega.config import Config
from r1mega.run.closing import closing_table
from r1mega.run.directory import RunDirectory
from r1mega.run.report import write_report


def main(config: Config) -> int:
    """Write it from what the run has recorded so far; the exit status."""
    close(RunDirectory(Path(config.run.root) / config.name))
    return 0


def close(directory: RunDirectory) -> None:
    """Write the report and print what the run came to."""
    write_report(directory)
    Console().print(closing_table(directory))
