"""The table a run ends with: what it learned, in a few lines, and where the report is."""

from rich.table import Table

from r1mega.run.directory import RunDirectory
from r1mega.run.metrics import read_metrics
from r1mega.run.summary import ENDS, change, format_duration, format_number

# (title, key, number of steps on either side)
_LINES = (
    ("accuracy", "reward/accuracy", ENDS),
    ("format", "reward/format", ENDS),
    ("response length (tokens)", "response/length_mean", ENDS),
    ("held-out pass@1", "eval/pass@1", 1),
)


def closing_table(directory: RunDirectory) -> Table:
    """First against last steps; held-out accuracy before against after."""
    rows = read_metrics(directory.metrics)
    table = Table(title=directory.path.name, caption=_caption(directory, rows), min_width=64)
    table.add_column("")
    table.add_column(f"first {ENDS} steps", justify="right")
    table.add_column(f"last {ENDS} steps", justify="right")
    table.add_column("change", justify="right")
    for title, key, ends in _LINES:
        found = change(rows, key, ends)
        if found is None:
            continue
        before, after = format_number(found.before), format_number(found.after)
        difference = found.after - found.before
        sign = "+" if difference >= 0 else "-"
        table.add_row(title, before, after, f"{sign}{format_number(abs(difference))}")
    return table


def _caption(directory: RunDirectory, rows: list[dict[str, float]]) -> str:
    if not rows:
        return f"no metrics in {directory.metrics}"
    steps = f"step {rows[-1]['step']} after {format_duration(rows[-1]['time_s'])}"
    return f"{steps}; report: {directory.report}" if directory.report.exists() else steps
