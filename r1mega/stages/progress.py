"""How far a stage is: a bar on a terminal, a plain line now and then in the log of a batch job."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINES = 10  # of a stage, at least
_LONGEST_SILENCE_S = 30.0

Advance = Callable[[int, str], None]


def say(text: str) -> None:
    """One plain line at once, whatever standard output is."""
    print(text, flush=True)


@contextmanager
def progress_bar(name: str, total: int, done: int, *, shown: bool) -> Iterator[Advance]:
    """Yields ``advance(count, note)``: steps done, and a few words on how it goes."""
    if not shown:
        yield lambda count, note: None
    elif sys.stdout.isatty():
        with _bar() as bar:
            task = bar.add_task(name, total=total, completed=done, note="")
            yield lambda count, note: bar.update(task, advance=count, note=note)
    else:
        yield _lines(name, total, done)


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )


def _lines(name: str, total: int, done: int) -> Advance:
    """Speaks after every tenth of the steps, and after a step that ends a long silence."""
    every = max(1, total // _LINES)
    last_time = time.monotonic()

    def advance(count: int, note: str) -> None:
        nonlocal done, last_time
        before, done = done, done + count
        silence = time.monotonic() - last_time
        if before // every < done // every or done == total or silence > _LONGEST_SILENCE_S:
            say(f"{name} {done}/{total}: {note}")
            last_time = time.monotonic()

    return advance
