"""The format reward of R1-Zero: are the tags there, once each, in order, with nothing around them?

The response holds both tag pairs, since the prompt ends with "Assistant:". As in the paper the rule
is about tags only: an empty thought or answer passes, for what is inside is the other rewards'
business. White space around the two blocks is free; any other character outside them fails.
"""

import re

from r1mega.records import Prompt, Sample, Score
from r1mega.rewards.answer import ANSWER, END_ANSWER, END_THINK, THINK

_TAGS = (THINK, END_THINK, ANSWER, END_ANSWER)
_TEMPLATE = re.compile(rf"\s*{THINK}.*{END_THINK}\s*{ANSWER}.*{END_ANSWER}\s*", re.DOTALL)


def format_reward(pairs: list[tuple[Prompt, Sample]]) -> list[Score]:
    """1 for a response in the template of R1-Zero, else 0."""
    values = [float(follows_format(sample.text)) for _, sample in pairs]
    return [
        Score(value=value, parts={"format": value}, reason="" if value else "wrong format")
        for value in values
    ]


def follows_format(response: str) -> bool:
    """``follows_format("<think>3 + 4</think> <answer>7</answer>")`` is True."""
    once_each = all(response.count(tag) == 1 for tag in _TAGS)
    return once_each and _TEMPLATE.fullmatch(response) is not None
