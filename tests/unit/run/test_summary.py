"""Two numbers per metric, and how numbers are written."""

import pytest

from r1mega.run.summary import Change, change, format_duration, format_number, metric_keys, series

ROWS = [
    {"step": 0, "time_s": 0.0, "eval/pass@1": 0.25},
    {"step": 1, "time_s": 1.0, "loss": 1.0},
    {"step": 2, "time_s": 2.0, "loss": None},
    {"step": 3, "time_s": 3.0, "loss": 3.0},
    {"step": 4, "time_s": 4.0, "loss": 5.0, "eval/pass@1": 0.75},
    {"step": 5, "time_s": 5.0, "loss": 7.0},
]


def test_series_skips_what_is_missing() -> None:
    assert series(ROWS, "loss") == ([1, 3, 4, 5], [1.0, 3.0, 5.0, 7.0])
    assert series(ROWS, "reward/mean") == ([], [])


def test_change_is_a_mean_at_either_end() -> None:
    assert change(ROWS, "loss") == Change(3.0, 5.0)
    assert change(ROWS, "eval/pass@1", ends=1) == Change(0.25, 0.75)
    assert change(ROWS, "reward/mean") is None


def test_metric_keys() -> None:
    assert metric_keys(ROWS) == ["eval/pass@1", "loss"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.0, "1"),
        (0.125, "0.125"),
        (-0.04164, "-0.0416"),
        (12.345, "12.3"),
        (1234.5, "1,234"),
        (16783360.0, "1.7e+07"),
        (3.149e-13, "3.1e-13"),
        (0.0003, "0.0003"),
    ],
)
def test_format_number(value: float, text: str) -> None:
    assert format_number(value) == text


def test_format_duration() -> None:
    assert [format_duration(s) for s in (0.4, 59.6, 61, 3725)] == [
        "0 s",
        "1 min 00 s",
        "1 min 01 s",
        "1 h 02 min",
    ]
