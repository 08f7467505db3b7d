"""Answers against gold answers, decided by math-verify in real worker processes."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from r1mega.records import Prompt, Sample
from r1mega.rewards.equality import readings
from r1mega.rewards.math import MathReward

Pair = tuple[Prompt, Sample]
DATA = Path(os.environ.get("R1MEGA_DATA", Path(__file__).parents[3] / ".." / "shared" / "data"))
CASES = DATA / "math_grader_cases.jsonl"
# math-verify reads 10_2 as 10 with an index, not as a number in base 2.
DISAGREEMENTS = {"base"}
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def reward() -> Iterator[MathReward]:
    reward = MathReward(num_workers=1, cpu_seconds=2.0)
    yield reward
    reward.close()


EQUAL = [
    ("42", "42"),
    ("42", "\\boxed{42}"),
    ("42", "$42$"),
    ("42", "42.0"),
    ("42", "042"),
    ("42", "The answer is 42."),
    ("18", "$18"),
    ("18", "18 dollars"),
    ("18", "$18 per day"),
    ("1000", "1,000"),
    ("1,000", "1000"),
    ("-5", "-5"),
    ("-5", "\u22125"),
    ("\\frac{1}{2}", "0.5"),
    ("1/2", "\\frac{1}{2}"),
    ("1/2", "\\frac{2}{4}"),
    ("\\frac{3}{2}", "1\\frac{1}{2}"),
    ("50\\%", "0.5"),
    ("1024", "2^{10}"),
    ("8", "3+5"),
    ("7", "x = 7"),
    ("\\sqrt{8}", "2\\sqrt{2}"),
    ("x^2+1", "1+x^2"),
    ("(x+1)^2", "x^2+2x+1"),
    ("\\{1,2\\}", "\\{2,1\\}"),
    ("(1,2)", "\\boxed{(1, 2)}"),
    ("90", "90^\\circ"),
    ("Paris", "paris"),
    ("7", "first \\boxed{6}, no: \\boxed{7}"),
]
DIFFERENT = [
    ("42", "43"),
    ("42", "-42"),
    ("5", "-5 dollars"),
    ("7", "3 or 7"),
    ("7", "3, 7"),
    ("7", "7, 3"),
    ("7", "$3$ or $7$"),
    ("7", "\\{1,2,3,4,5,6,7\\}"),
    ("7", "x \\in [0,10]"),
    ("7", "\\boxed{7}, no: \\boxed{6}"),
    ("1/3", "0.333"),
    ("0.3333333", "0.3333334"),
    ("e", "2.718281828"),
    ("\\pi", "3.14159"),
    ("1000000007", "1000000008"),
    ("10000000000000000", "10000000000000001"),
    ("(1,2)", "(2,1)"),
    ("[0,1)", "(0,1)"),
    ("Paris", "pairs"),
    ("Paris", "London"),
    ("7", "."),
    ("7", "seven sevens"),
    ("7", "\x00"),
    ("1", "True"),
    ("1", "__import__('os').getpid()"),
    ("\\infty", "oo"),
]


def test_equal_answers(reward: MathReward, pair: Callable[[str, str], Pair]) -> None:
    scores = reward([pair(gold, f"<answer>{text}</answer>") for gold, text in EQUAL])
    assert [case for case, score in zip(EQUAL, scores, strict=True) if score.value != 1.0] == []


def test_different_answers(reward: MathReward, pair: Callable[[str, str], Pair]) -> None:
    scores = reward([pair(gold, f"<answer>{text}</answer>") for gold, text in DIFFERENT])
    wrong = [case for case, score in zip(DIFFERENT, scores, strict=True) if score.value != 0.0]
    assert wrong == []
    assert {score.error for score in scores} == {None}


def test_what_text_alone_settles_costs_no_worker(pair: Callable[[str, str], Pair]) -> None:
    reward = MathReward(num_workers=1, cpu_seconds=2.0)
    pids = {worker._process.pid for worker in reward._pool._workers}
    for pid in pids:
        os.kill(pid, 9)  # nobody is there to ask
    scores = reward(
        [
            pair(" 7 ", "<think>x</think><answer> 7</answer>"),
            pair("7", "<think><answer>7</answer></think>"),
            pair("7", "<answer> </answer>"),
            pair("7", "<answer>" + "7" * 3000 + "</answer>"),
        ]
    )
    reward.close()
    assert [(score.value, score.reason) for score in scores] == [
        (1.0, "equal text"),
        (0.0, "no answer"),
        (0.0, "empty answer"),
        (0.0, "answer of 3000 characters (limit 2000)"),
    ]


def test_a_hostile_answer_is_wrong_and_harms_no_other(
    reward: MathReward, pair: Callable[[str, str], Pair]
) -> None:
    answers = ["\\frac{2}{4}", "9^{9^{9}}", "\\sum_{n=1}^{10^{12}} \\frac{1}{n^{1.5}}", "0.50"]
    scores = reward([pair("1/2", f"<answer>{text}</answer>") for text in answers])
    assert [score.value for score in scores] == [1.0, 0.0, 0.0, 1.0]
    assert [score.timed_out for score in scores] == [False, True, True, False]
    assert scores[1].reason == "comparison stopped: 2 CPU seconds"
    assert [score.error for score in scores] == [None] * 4


def test_readings() -> None:
    assert readings("7 or 8") == ["\\boxed{7 or 8}"]
    assert readings("18 dollars") == ["\\boxed{18 dollars}", "18 dollars"]
    assert readings("$\\frac12$ of it") == ["$\\frac12$ of it"]
    assert readings("\\boxed{7}") == ["\\boxed{7}"]


@pytest.mark.skipif(not CASES.exists(), reason=f"no shared cases at {CASES}")
def test_shared_cases(reward: MathReward, pair: Callable[[str, str], Pair], tmp_path: Path) -> None:
    cases = [json.loads(line) for line in CASES.read_text().splitlines()]
    cases = [case for case in cases if case["expected"] != "policy"]
    pairs = []
    for case in cases:
        text = case["answer"].replace("{CANARY}", str(tmp_path))
        pairs.append(pair(case["gold"], text if "<think>" in text else f"<answer>{text}</answer>"))
    wrong = {
        case["name"]
        for case, score in zip(cases, reward(pairs), strict=True)
        if score.value != case["expected"]
    }
    assert wrong == DISAGREEMENTS
    assert list(tmp_path.iterdir()) == []  # no injected command ran
