"""Which part of a response is the answer. Pure text, no mathematics.

The rules, each a row of the test's table:
- Thinking is not an answer: only text after the last ``</think>`` counts, and none of it from a
  later ``<think>`` on. A response without think tags is searched whole (the format reward already
  says what is missing); one whose only ``<think>`` is never closed has no answer after it.
- The answer is the text of the last complete ``<answer>...</answer>``; an ``<answer>`` that is
  never closed is not an answer, and of nested ones the innermost counts.
- Inside it, a ``\\boxed{`` announces the final answer: what precedes the last one is left out.
"""

THINK, END_THINK = "<think>", "</think>"
ANSWER, END_ANSWER = "<answer>", "</answer>"
BOXED = "\\boxed{"


def extract_answer(response: str) -> str | None:
    """``extract_answer("<think>3 + 4</think> <answer> 7 </answer>") == "7"``"""
    visible = response.rpartition(END_THINK)[2].partition(THINK)[0]
    last_end = visible.rfind(END_ANSWER)
    begin = visible.rfind(ANSWER, 0, max(last_end, 0))
    if begin < 0:
        return None
    begin += len(ANSWER)
    answer = visible[begin : visible.index(END_ANSWER, begin)]
    return answer[max(answer.rfind(BOXED), 0) :].strip()
