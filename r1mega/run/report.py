"""report.html: a whole run on one self-contained page, readable offline, in light and dark.

Model text is hostile. Every string from the run passes ``escape`` on its way into the page, and the
page's content security policy forbids scripts and network access in any case.
"""

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from r1mega.run.charts import Chart, charts, draw
from r1mega.run.directory import RunDirectory
from r1mega.run.metrics import read_metrics
from r1mega.run.report_style import CSS
from r1mega.run.samples import first_and_last
from r1mega.run.summary import ENDS, change, format_duration, format_number, metric_keys, series
from r1mega.system.files import write_atomically

MAX_PAIRS = 4
MAX_RESPONSE_CHARS = 20_000
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_TAGS = re.compile(r"&lt;/?(?:think|answer)&gt;")


def write_report(directory: RunDirectory) -> Path:
    """Write the page from what the run has recorded so far, and return its path."""
    rows = read_metrics(directory.metrics)
    if not rows:
        raise ValueError(
            f"{directory.metrics} has no metrics yet: a report needs at least one step"
        )
    first, last = first_and_last(directory)
    sections = [
        _header(directory.path.name, rows),
        _tiles(rows),
        _curves(rows),
        _samples(first, last),
        _numbers(rows),
        _config(directory.config_path),
    ]
    page = _PAGE.format(
        policy=_POLICY, title=escape(directory.path.name), css=CSS, body="\n".join(sections)
    )
    # A byte-level tokenizer can produce half a character, which UTF-8 cannot hold.
    write_atomically(directory.report, page.encode("utf-8", "replace"))
    return directory.report


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} - r1mega</title>
<style>{css}</style>
</head>
<body>
{body}
</body>
</html>
"""


def _header(name: str, rows: Sequence[dict[str, Any]]) -> str:
    last = rows[-1]
    lead = f"{last['step']} steps in {format_duration(last['time_s'])}"
    return f'<h1>{escape(name)}</h1>\n<p class="lead">{lead}</p>'


def _tiles(rows: Sequence[dict[str, Any]]) -> str:
    ends = f"first {ENDS} to last {ENDS} steps"
    wanted = (
        ("Accuracy", "reward/accuracy", ENDS, ends),
        ("Response length", "response/length_mean", ENDS, f"tokens, {ends}"),
        ("Held-out pass@1", "eval/pass@1", 1, "before and after"),
        ("Sampler against learner", "mismatch/max", ENDS, "nats, largest difference of a token"),
    )
    tiles = []
    for title, key, width, note in wanted:
        found = change(rows, key, width)
        if found is not None:
            before, after = format_number(found.before), format_number(found.after)
            tiles.append(
                f'<div class="card tile"><span>{title}</span>'
                f"<b><i>{before} &rarr;</i> {after}</b><span>{note}</span></div>"
            )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _curves(rows: Sequence[dict[str, Any]]) -> str:
    cards = "\n".join(_chart_card(chart, rows) for chart in charts(rows))
    return f'<h2>Curves over steps</h2>\n<div class="charts">{cards}</div>'


def _chart_card(chart: Chart, rows: Sequence[dict[str, Any]]) -> str:
    labels = [label for _, label in chart.lines]
    swatches = "".join(
        f'<span><s style="background:var(--c{index})"></s>{escape(label)}</span>'
        for index, label in enumerate(labels)
    )
    legend = f'<div class="legend">{swatches}</div>' if len(labels) > 1 else ""
    note = f'<div class="note">{escape(chart.note)}</div>' if chart.note else ""
    wide = " wide" if chart.kind == "stack" else ""
    return (
        f'<div class="card chart{wide}"><h3>{escape(chart.title)}<span class="unit">'
        f"{escape(chart.unit)}</span></h3>{legend}{draw(chart, rows)}{note}</div>"
    )


def _samples(first: list[dict[str, Any]], last: list[dict[str, Any]]) -> str:
    """Early and late responses side by side, to the same prompt where there are such."""
    if not first:
        return ""
    pairs = "\n".join(
        f'<div class="pair">{_sample_card(early)}{_sample_card(late)}</div>'
        for early, late in _paired(first, last)[:MAX_PAIRS]
    )
    return f"<h2>Responses, early and late</h2>\n{pairs}"


def _paired(
    first: list[dict[str, Any]], last: list[dict[str, Any]]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    by_uid = {row["uid"]: row for row in last}
    same = [(row, by_uid[row["uid"]]) for row in first if row["uid"] in by_uid]
    return same or list(zip(first, last, strict=False))


def _sample_card(row: dict[str, Any]) -> str:
    chips = "".join(
        f'<span class="chip {"yes" if part else "no"}">{escape(name)} {format_number(part)}</span>'
        for name, part in row["parts"].items()
    )
    facts = f"step {row['step']} &middot; {row['length']} tokens &middot; {row['finish_reason']}"
    reason = f'<div class="note">{escape(row["reason"])}</div>' if row["reason"] else ""
    return (
        f'<div class="card"><div class="meta"><span>{facts}</span>{chips}'
        f'<span class="chip">gold {escape(row["answer"][:80])}</span></div>'
        f'<pre class="question">{escape(row["prompt"])}</pre>'
        f"<pre>{_marked(row['response'])}</pre>{reason}</div>"
    )


def _marked(response: str) -> str:
    """Escaped text with the template's tags in colour."""
    text = escape(response[:MAX_RESPONSE_CHARS])
    text = _TAGS.sub(lambda match: f'<span class="tag">{match[0]}</span>', text)
    more = len(response) - MAX_RESPONSE_CHARS
    return f"{text} [{more:,} more characters]" if more > 0 else text


def _numbers(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for key in sorted(metric_keys(rows)):
        _, values = series(rows, key)
        found = change(rows, key)
        if found is not None:
            numbers = (found.before, found.after, min(values), max(values))
            cells = "".join(f"<td>{format_number(number)}</td>" for number in numbers)
            lines.append(f"<tr><td>{escape(key)}</td>{cells}</tr>")
    heads = ("metric", f"first {ENDS}", f"last {ENDS}", "lowest", "highest")
    head = "".join(f"<th>{name}</th>" for name in heads)
    table = f"<table><tr>{head}</tr>{''.join(lines)}</table>"
    return f'<h2>Numbers</h2>\n<div class="card scroll">{table}</div>'


def _config(path: Path) -> str:
    if not path.exists():
        return ""
    text = escape(path.read_text())
    return (
        '<h2>Configuration</h2>\n<details class="card"><summary>'
        f"{escape(path.name)}</summary><pre>{text}</pre></details>"
    )
