"""The R1-Zero template: tags once each, in order, nothing around them."""

import pytest

from r1mega.rewards.format import follows_format


@pytest.mark.parametrize(
    "response",
    [
        "<think>3 + 4</think><answer>7</answer>",
        "<think>3 + 4</think> <answer>7</answer>",
        "\n <think>\n3\n</think>\n\n<answer>\n7\n</answer>\n",
        "<think></think><answer></answer>",  # the rule is about tags only
        "<think>a < b > c & <b></think><answer><i>7</i></answer>",
    ],
)
def test_follows(response: str) -> None:
    assert follows_format(response)


@pytest.mark.parametrize(
    "response",
    [
        "",
        "7",
        "<answer>7</answer>",
        "<think>3 + 4</think>",
        "<think>3 + 4</think> 7",
        "<think>3 + 4 <answer>7</answer>",
        "<think>3 + 4</think><answer>7",
        "3 + 4</think><answer>7</answer>",
        "<answer>7</answer><think>3 + 4</think>",
        "<think>3 + 4<answer>7</answer></think>",
        "<think>3 + 4<answer></think>7</answer>",
        "</think>3<think><answer>7</answer>",
        "<think>3</think></answer>7<answer>",
        "so <think>3 + 4</think><answer>7</answer>",
        "<think>3 + 4</think> so <answer>7</answer>",
        "<think>3 + 4</think><answer>7</answer>.",
        "<think>3</think><think>4</think><answer>7</answer>",
        "<think>3<think>4</think><answer>7</answer>",
        "<think>3</think><answer>7</answer><answer>8</answer>",
        "<think>3</think><answer>7</answer></answer>",
        "<Think>3</Think><answer>7</answer>",
        "< think>3</think><answer>7</answer>",
    ],
)
def test_does_not_follow(response: str) -> None:
    assert not follows_format(response)
