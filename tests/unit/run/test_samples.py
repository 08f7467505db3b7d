"""samples.jsonl: which responses of a step are kept, and that a resumed run has them once."""

import json
from collections.abc import Callable

from r1mega.records import Group
from r1mega.run.directory import RunDirectory
from r1mega.run.samples import first_and_last, truncate_samples_after, write_samples

MakeGroup = Callable[[str, list[str]], Group]


def test_rows_spread_over_groups(run: RunDirectory, group: MakeGroup) -> None:
    groups = [group("p/0", ["a", "bb", "ccc"]), group("p/1", ["d", "ee", "fff"])]
    write_samples(run, 3, groups, rows=3)
    rows = [json.loads(line) for line in run.samples.read_text().splitlines()]
    assert [row["uid"] for row in rows] == ["p/0#0", "p/1#0", "p/0#1"]
    assert rows[2] == {
        "step": 3,
        "uid": "p/0#1",
        "prompt": "User: What is 3 + 4?",
        "answer": "7",
        "response": "bb",
        "value": 2.0,
        "parts": {"accuracy": 1.0, "format": 1.0},
        "reason": "",
        "error": None,
        "length": 2,
        "finish_reason": "stop",
        "versions": [[4, 0, 2]],
    }


def test_first_and_last_and_truncation(run: RunDirectory, group: MakeGroup) -> None:
    assert first_and_last(run) == ([], [])
    truncate_samples_after(run, 0)
    for step in (1, 2, 3):
        write_samples(run, step, [group(f"p/{step}", ["a\n\u2028", "\ud800"])], rows=2)
    with run.samples.open("a") as file:
        file.write('{"step": 4')
    first, last = first_and_last(run)
    assert [row["uid"] for row in first] == ["p/1#0", "p/1#1"]
    assert [row["uid"] for row in last] == ["p/3#0", "p/3#1"]
    assert [row["response"] for row in first] == ["a\n\u2028", "\ud800"]
    truncate_samples_after(run, 2)
    write_samples(run, 3, [group("p/9", ["a"])], rows=5)
    rows = [json.loads(line) for line in run.samples.read_text().splitlines()]
    assert [row["uid"] for row in rows] == ["p/1#0", "p/1#1", "p/2#0", "p/2#1", "p/9#0"]
