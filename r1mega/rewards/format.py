"""The format reward of R1-Zero: are the tags there, once each, in order, with nothing around them?

The response holds both tag pairs, since the prompt ends with "Assistant:". As in the paper the rule
is about tags only: an empty thought or answer passes, for what is inside is the other rewards'
business. White space around the two blocks is free; any other character outside them fails.
"""

from r1mega.rewards.answer import ANSWER, END_ANSWER, END_THINK, THINK

_TAGS = (THINK, END_THINK, ANSWER, END_ANSWER)


def follows_format(response: str) -> bool:
    """``follows_format("<think>3 + 4</think> <answer>7</answer>")`` is True."""
    if any(response.count(tag) != 1 for tag in _TAGS):
        return False
    before, rest = response.split(THINK)
    thought_and_gap, rest = rest.split(ANSWER) if ANSWER in rest else ("", "")
    _, end_think, between = thought_and_gap.partition(END_THINK)
    _, end_answer, after = rest.partition(END_ANSWER)
    in_order = bool(end_think and end_answer)
    return in_order and not (before.strip() or between.strip() or after.strip())
