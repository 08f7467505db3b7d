import pytest

from r1mega.learner.schedule import learning_rate


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("constant", 0, 0.25),
        ("constant", 3, 1.0),
        ("constant", 100, 1.0),
        ("linear", 9, 0.55),
        ("cosine", 9, 0.55),
        ("cosine", 14, 0.1),
        ("linear", 99, 0.1),
    ],
)
def test_warm_up_then_decay(schedule: str, step: int, expected: float) -> None:
    rate = learning_rate(
        step, lr=1.0, min_lr=0.1, warmup_steps=4, total_steps=14, schedule=schedule
    )
    assert rate == pytest.approx(expected)
