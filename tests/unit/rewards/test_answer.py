"""Where the answer of a response is: every rule of rewards/answer.py is a row here."""

import pytest

from r1mega.rewards.answer import extract_answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<think>3 + 4</think> <answer> 7 </answer>", "7"),
        ("<think></think><answer>\n\\boxed{7}\n</answer>", "\\boxed{7}"),
        ("<answer>7</answer>", "7"),  # no think tags: searched whole
        ("so it is <answer>7</answer>. Done.", "7"),
        # thinking is not an answer
        ("<think><answer>7</answer></think>", None),
        ("<think><answer>7</answer></think> <answer>8</answer>", "8"),
        ("<think><answer>7</answer>", None),
        ("<answer>6</answer><think><answer>7</answer>", "6"),
        ("<think>a</think><answer>6</answer><think>b</think><answer>7</answer>", "7"),
        ("<think>a</think><answer>6</answer><think>b</think> hm", None),
        ("a</think><answer>7</answer>", "7"),  # a prompt that opened the thought itself
        # missing, unclosed, several, nested
        ("<think>3 + 4 = 7</think> 7", None),
        ("<think>a</think><answer>7", None),
        ("<think>a</think>7</answer>", None),
        ("</answer>7<answer>", None),
        ("", None),
        ("<answer></answer>", ""),
        ("<answer>6</answer> or <answer>7</answer>", "7"),
        ("<answer>6</answer> or <answer>7", "6"),
        ("<answer>6 <answer>7</answer></answer>", "7"),
        ("<ANSWER>7</ANSWER>", None),
        # the last box announces the final answer
        ("<answer>first \\boxed{6}, then \\boxed{7}.</answer>", "\\boxed{7}."),
        ("<answer>\\boxed{\\boxed{7}}</answer>", "\\boxed{7}}"),
    ],
)
def test_extract_answer(response: str, answer: str | None) -> None:
    assert extract_answer(response) == answer
