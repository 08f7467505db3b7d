"""Do two answers mean the same? math-verify decides; this runs in a worker process only.

How a text is read: with a ``\\boxed{}`` or delimiters of its own as it stands; otherwise the whole
text is one formula, so that "3 or 7" is a set and not its last number; a text with exactly one
number ("18 dollars", "The answer is 42.") may also be that number. Words are compared as words:
read as formulas they would be products of letters, and "Paris" would equal "pairs".

Nothing here evaluates model text: math-verify's grammar does, and its own alarm is off because it
measures wall time and swallows the expiry; the worker's CPU clock is the limit.
"""

import logging
import re
from collections.abc import Callable
from typing import Any

# Decimal places in which floats must agree. math-verify's default of 6 accepts 2.718281828 for e
# and 0.3333334 for 0.3333333: a reward should ask for the number itself.
FLOAT_ROUNDING = 12

_DELIMITED = re.compile(r"\\boxed|\\\(|\\\[|\$[^$]+\$")
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?|\.\d+")
_WORDS = re.compile(r"[^\W\d_]{3,}(?:[\s-]+[^\W\d_]+)*")


def load_equality() -> Callable[[Any], bool]:
    """Import math-verify, then hand out ``[gold, answer] -> bool`` (a worker's setup function)."""
    logging.disable(logging.WARNING)  # "timeout is disabled": it is, see above
    from math_verify import parse, verify

    def read(text: str) -> Any:
        return parse(text, parsing_timeout=None)

    def equal(pair: Any) -> bool:
        gold, answer = pair
        if _WORDS.fullmatch(gold):
            return bool(gold.casefold() == answer.casefold())
        answers = [reading for form in readings(answer) for reading in read(form)]
        options = {"float_rounding": FLOAT_ROUNDING, "timeout_seconds": None}
        return bool(verify(read(readings(gold)[0]), answers, **options))

    return equal


def readings(text: str) -> list[str]:
    """The forms in which math-verify gets a text: ``readings("x") == ["\\\\boxed{x}"]``."""
    if _DELIMITED.search(text):
        return [text]
    boxed = f"\\boxed{{{text}}}"
    return [boxed, text] if len(_NUMBER.findall(text)) == 1 else [boxed]
