"""Records for reward tests."""

from collections.abc import Callable

import pytest

from r1mega.records import Prompt, Sample

Pair = tuple[Prompt, Sample]


@pytest.fixture
def pair() -> Callable[[str, str], Pair]:
    """``pair(gold, response)``"""

    def make(gold: str, response: str) -> Pair:
        prompt = Prompt(uid="p/0", text="?", token_ids=(3,), question="?", answer=gold)
        sample = Sample(
            uid="p/0#0",
            prompt_uid="p/0",
            index=0,
            token_ids=(4,),
            sampler_logprobs=(-0.5,),
            text=response,
            finish_reason="stop",
            versions=(),
        )
        return prompt, sample

    return make
