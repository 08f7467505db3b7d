"""Curves as SVG fragments in the colours of the page, so that one drawing suits light and dark.

A chart is a value: what to draw from which keys. Keys without a number are left out, and a chart
without any is no chart. matplotlib draws with marker colours which are then replaced by CSS
variables; text stays text, in the font of the page.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from r1mega.run.summary import metric_keys, series

NUM_COLORS = 8
_COLORS = [f"#c0ffe{index}" for index in range(NUM_COLORS)]  # become var(--c0) ... var(--c7)
_INK, _GRID = "#c0ffea", "#c0ffeb"  # become var(--muted), var(--grid)
_SMOOTH_FROM = 12  # steps


@dataclass(frozen=True, slots=True)
class Chart:
    """``lines`` are (key, label) pairs, drawn one by one or stacked to their sum (then wide)."""

    title: str
    unit: str
    lines: tuple[tuple[str, str], ...]
    note: str = ""
    kind: Literal["lines", "stack"] = "lines"
    top: float | None = None  # upper end of the axis, which then starts at 0
    log: bool = False


def charts(rows: Sequence[dict[str, Any]]) -> list[Chart]:
    """The charts of a run, in reading order, each with only the lines that have numbers."""
    keys = [key for key in metric_keys(rows) if series(rows, key)[1]]
    evals = tuple((key, f"held-out {key[5:]}") for key in keys if re.match("eval/.*@", key))
    not_parts = {"mean", "std", "accuracy", "errors", "timeouts"}
    parts = tuple(
        (key, key[7:]) for key in keys if key.startswith("reward/") and key[7:] not in not_parts
    )
    times = tuple(
        (key, key[5:-2]) for key in keys if key.startswith("time/") and key != "time/step_s"
    )
    wanted = [
        Chart("Accuracy", "share", (("reward/accuracy", "training prompts"), *evals), top=1.0),
        Chart(
            "Response length",
            "tokens",
            (("response/length_mean", "training prompts"), ("eval/length_mean", "held-out")),
        ),
        Chart("Reward", "", (("reward/mean", "weighted sum"), *parts)),
        Chart(
            "Entropy",
            "nats per token",
            (("policy/entropy", "policy"),),
            "Collapse ends exploration.",
        ),
        Chart("KL to the reference", "nats per token", (("policy/kl", "k3 estimate"),)),
        Chart(
            "Sampler against learner",
            "nats",
            (("mismatch/kl", "k3, mean per token"), ("mismatch/max", "largest, one token")),
            "Rounding only; a step up is a bug.",
            log=True,
        ),
        Chart("Loss", "", (("loss", "loss"),)),
        Chart("Gradient norm", "before clipping", (("learner/grad_norm", "norm"),)),
        Chart("Response limit", "share cut off", (("response/truncated", "truncated"),)),
        Chart(
            "Throughput",
            "tokens per second",
            (("rollout/tokens_per_s", "rollout"), ("learner/tokens_per_s", "update")),
        ),
        Chart("Where the time goes", "seconds per step", times, kind="stack"),
    ]
    found = [_only(chart, set(keys)) for chart in wanted]
    return [chart for chart in found if chart.lines]


def draw(chart: Chart, rows: Sequence[dict[str, Any]]) -> str:
    """The chart as an ``<svg>`` element."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": chart.title}):
        width = 10.9 if chart.kind == "stack" else 5.4
        figure = Figure(figsize=(width, 2.5), layout="constrained")
        axes = figure.add_subplot()
        if chart.kind == "stack":
            _stack(axes, chart, rows)
        else:
            _lines(axes, chart, rows)
        _dress(axes, chart)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _themed(buffer.getvalue(), chart.title)


def _only(chart: Chart, keys: set[str]) -> Chart:
    lines = tuple((key, label) for key, label in chart.lines if key in keys)[:NUM_COLORS]
    return replace(chart, lines=lines)


def _lines(axes: Axes, chart: Chart, rows: Sequence[dict[str, Any]]) -> None:
    smallest = 1.0
    for (key, _), color in zip(chart.lines, _COLORS, strict=False):
        steps, values = series(rows, key)
        smallest = min([smallest, *values])
        if key.startswith("eval/") or len(steps) < _SMOOTH_FROM:
            axes.plot(steps, values, color=color, linewidth=1.8, marker="o", markersize=3.5)
        else:
            axes.plot(steps, values, color=color, linewidth=0.9, alpha=0.4)
            axes.plot(steps, running_mean(values), color=color, linewidth=2.0)
    if chart.log and smallest > 0:
        axes.set_yscale("log")
    elif chart.top is not None:
        axes.set_ylim(-0.02 * chart.top, 1.04 * chart.top)
        axes.set_yticks([chart.top * quarter / 4 for quarter in range(5)])
    elif smallest >= 0:
        axes.set_ylim(bottom=0)


def _stack(axes: Axes, chart: Chart, rows: Sequence[dict[str, Any]]) -> None:
    keys = [key for key, _ in chart.lines]
    timed = [row for row in rows if any(row.get(key) is not None for key in keys)]
    columns = [[row.get(key) or 0.0 for row in timed] for key in keys]
    steps = [row["step"] for row in timed]
    axes.stackplot(steps, columns, colors=_COLORS, alpha=0.85, linewidth=0)
    axes.set_ylim(bottom=0)


def running_mean(values: Sequence[float]) -> list[float]:
    """Centred mean over about a tenth of the run; shorter windows at the ends."""
    half = max(1, len(values) // 20)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _dress(axes: Axes, chart: Chart) -> None:
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.tick_params(colors=_INK, length=0, labelsize=8.5)
    axes.margins(x=0.015)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    if axes.get_yscale() == "linear":
        if chart.top is None:
            axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    else:
        axes.minorticks_off()


def _themed(svg: str, title: str) -> str:
    """An inline element in the colours of the page, without what only a standalone file needs."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
    variables = {color: f"var(--c{index})" for index, color in enumerate(_COLORS)}
    for color, variable in (variables | {_INK: "var(--muted)", _GRID: "var(--grid)"}).items():
        svg = svg.replace(color, variable)
    return svg
