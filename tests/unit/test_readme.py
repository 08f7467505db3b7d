"""What the README says of the code is true of the code."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_line_counts_of_the_code_tour() -> None:
    rows = re.findall(r"^\| \[([^\]]+\.py)\]\([^)]+\) \| (\d+) \|", readme(), re.MULTILINE)
    assert len(rows) >= 5
    counted = {name: len((ROOT / name).read_text().splitlines()) for name, _ in rows}
    assert {name: int(lines) for name, lines in rows} == counted


def test_every_link_leads_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", readme())
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_every_file_of_a_command_exists() -> None:
    layers = re.findall(r"configs/[\w/]+\.yaml", readme())
    assert layers
    assert [layer for layer in layers if not (ROOT / layer).exists()] == []


def readme() -> str:
    return (ROOT / "README.md").read_text()
