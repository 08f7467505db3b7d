"""A metric over a run in two numbers: its mean over the first and over the last few steps. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

ENDS = 3  # steps on either side


@dataclass(frozen=True, slots=True)
class Change:
    """From where to where."""

    before: float
    after: float


def series(rows: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the rows that have a number for ``key``."""
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def change(rows: Sequence[dict[str, Any]], key: str, ends: int = ENDS) -> Change | None:
    """``change(rows, "reward/accuracy")``; None when no row has the key."""
    _, values = series(rows, key)
    return Change(fmean(values[:ends]), fmean(values[-ends:])) if values else None


def metric_keys(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Every metric of any row, in order of first appearance."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return [key for key in keys if key not in ("step", "time_s")]


def format_number(value: float) -> str:
    """Two to four digits, short: 0.125, 0.0416, 12.3, 1,234, 1.2e-07."""
    size = abs(value)
    if value == 0 or (value == int(value) and size < 1e6):
        return f"{int(value):,}"
    if size >= 1e6 or size < 1e-3:
        return f"{value:.2g}"
    decimals = max(0, 2 - math.floor(math.log10(size)))
    return f"{value:,.{decimals}f}"


def format_duration(seconds: float) -> str:
    """``format_duration(3725) == "1 h 02 min"``"""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
