"""Which curves a run has, and that their SVG is inert and themed."""

from xml.etree import ElementTree

import pytest

from r1mega.run.charts import charts, draw, running_mean

ROWS = [
    {
        "step": step,
        "time_s": float(step),
        "reward/accuracy": step / 20,
        "reward/language": 0.5,
        "eval/pass@1": 0.1 if step % 10 == 0 else None,
        "mismatch/kl": 1e-13,
        "mismatch/max": 0.0,
        "time/rollout_s": 2.0,
        "time/update_s": 1.0,
        "time/step_s": 3.5,
        "policy/kl": None,
    }
    for step in range(20)
]


def test_only_what_has_numbers_is_drawn() -> None:
    assert [(chart.title, [key for key, _ in chart.lines]) for chart in charts(ROWS)] == [
        ("Accuracy", ["reward/accuracy", "eval/pass@1"]),
        ("Reward", ["reward/language"]),
        ("Sampler against learner", ["mismatch/kl", "mismatch/max"]),
        ("Where the time goes", ["time/rollout_s", "time/update_s"]),
    ]
    assert charts([{"step": 0, "time_s": 0.0}]) == []


def test_svg_is_well_formed_themed_and_repeatable() -> None:
    for chart in charts(ROWS):
        svg = draw(chart, ROWS)
        root = ElementTree.fromstring(svg)
        assert root.tag.endswith("svg")
        assert root.get("width") is None
        assert "var(--c0)" in svg
        assert "var(--muted)" in svg
        assert "#c0ffe" not in svg
        assert draw(chart, ROWS) == svg


def test_one_row_is_enough() -> None:
    for chart in charts(ROWS[:1]):
        assert draw(chart, ROWS[:1]).startswith("<svg")


def test_running_mean() -> None:
    assert running_mean([1.0, 2.0, 6.0]) == [1.5, 3.0, 4.0]
    assert running_mean([2.0] * 100) == pytest.approx([2.0] * 100)
