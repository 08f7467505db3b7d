"""A progress bar on a terminal, nothing elsewhere."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def progress_bar(
    name: str, total: int, done: int, *, shown: bool
) -> Iterator[Callable[[int, str], None]]:
    """Yields ``advance(count, note)``: steps done, and a few words on how it goes."""
    if not (shown and sys.stdout.isatty()):
        yield lambda count, note: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns) as bar:
        task = bar.add_task(name, total=total, completed=done, note="")
        yield lambda count, note: bar.update(task, advance=count, note=note)
