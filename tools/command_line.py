"""What the tools share: folders and key=value arguments, progress on a terminal, exit status."""

import gc
import os
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args, get_origin, get_type_hints

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

_Options = TypeVar("_Options")


def run(main: Callable[[Sequence[str]], None], usage: str) -> int:
    """The exit status of ``main(arguments)``: 0, 1 with a sentence, or 130 on Ctrl-C."""
    arguments = sys.argv[1:]
    if not arguments or {"-h", "--help"} & set(arguments):
        print(usage)
        return 0 if arguments else 1
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # files of all ranks are open at once
    gc.freeze()  # looking for garbage in what imports made costs more than planning a conversion
    try:
        main(arguments)
    except BrokenPipeError:  # who reads the output has seen enough; nothing more can be written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def parse(
    arguments: Sequence[str], names: Sequence[str], options: type[_Options]
) -> tuple[list[Path], _Options]:
    """The folders called ``names``, then ``options``, a dataclass, from key=value arguments.

    Fields may be int (at least 1), bool, str, a Literal, or a Path or None. Raises ValueError with
    one sentence.
    """
    pairs = [argument.split("=", 1) for argument in arguments if _is_pair(argument)]
    folders = [Path(argument) for argument in arguments if not _is_pair(argument)]
    if len(folders) != len(names):
        raise ValueError(f"expected {' '.join(names)}, got {' '.join(map(str, folders)) or 'none'}")
    hints = get_type_hints(options)
    known = [field.name for field in fields(options)]  # type: ignore[arg-type]
    values = {}
    for key, value in pairs:
        if key not in known:
            near = get_close_matches(key, known, 1)
            meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise ValueError(f"unknown key {key!r}: {meant}")
        values[key] = _value(key, value, hints[key])
    return folders, options(**values)


def _is_pair(argument: str) -> bool:
    """Folders may have an = too, as ./lr=1e-5."""
    key, equals, _ = argument.partition("=")
    return bool(equals) and "/" not in key


def _value(key: str, value: str, hint: Any) -> Any:
    if hint is int:
        if not value.isdecimal() or int(value) < 1:
            raise ValueError(f"{key} must be a whole number of at least 1, got {value!r}")
        return int(value)
    allowed = ("true", "false") if hint is bool else get_args(hint)
    if hint is bool or get_origin(hint) is Literal:
        if value not in allowed:
            raise ValueError(f"{key} must be one of {', '.join(allowed)}, got {value!r}")
        return value == "true" if hint is bool else value
    return Path(value) if Path in allowed else value


class Bar:
    """Shows notes and progress on standard error. Use as a context manager."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def note(self, sentence: str) -> None:
        self._progress.console.print(sentence, highlight=False, soft_wrap=True)

    def progress(self, what: str, done: int, total: int) -> None:
        """``what`` happened to ``done`` of ``total`` bytes."""
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total)
        self._progress.update(self._tasks[what], completed=done)
