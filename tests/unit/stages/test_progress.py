"""What a batch job's log shows of a stage's progress."""

import pytest

from r1mega.stages import progress
from r1mega.stages.progress import progress_bar


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_a_line_per_tenth_of_the_steps(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("sft", 95, 0, shown=True) as advance:
        for step in range(95):
            advance(1, f"loss {step}")
    said = lines(capsys)
    assert said[0] == "sft 9/95: loss 8"
    assert said[-1] == "sft 95/95: loss 94"
    assert len(said) == 11


def test_a_resumed_run_counts_on_and_a_rollout_may_be_several_steps(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with progress_bar("rl", 20, 12, shown=True) as advance:
        advance(4, "a")
        advance(4, "b")
    assert lines(capsys) == ["rl 16/20: a", "rl 20/20: b"]


def test_a_long_silence_ends_with_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress_bar("rl", 1000, 0, shown=True) as advance:
        advance(1, "quiet")
        now = 31.0
        advance(1, "slow")
        advance(1, "quiet again")
    assert lines(capsys) == ["rl 2/1000: slow"]


def test_ranks_that_show_nothing_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("rl", 1, 0, shown=False) as advance:
        advance(1, "x")
    assert lines(capsys) == []
