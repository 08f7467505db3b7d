"""Run directories and records for the tests of the run floor."""

from collections.abc import Callable
from pathlib import Path

import pytest

from r1mega.records import Group, Prompt, Sample, Score, VersionRange
from r1mega.run.directory import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path, "test")


@pytest.fixture
def group() -> Callable[[str, list[str]], Group]:
    """``group("p/3", [response, ...])``: response i scores accuracy i % 2."""

    def make(uid: str, responses: list[str]) -> Group:
        samples = tuple(
            Sample(
                uid=f"{uid}#{index}",
                prompt_uid=uid,
                index=index,
                token_ids=tuple(range(len(text))),
                sampler_logprobs=(-1.0,) * len(text),
                text=text,
                finish_reason="stop",
                versions=(VersionRange(version=4, start=0, end=len(text)),),
            )
            for index, text in enumerate(responses)
        )
        scores = tuple(
            Score(value=i % 2 + 1.0, parts={"accuracy": float(i % 2), "format": 1.0})
            for i in range(len(responses))
        )
        question = "What is 3 + 4?"
        prompt = Prompt(
            uid=uid, text=f"User: {question}", token_ids=(1, 2), question=question, answer="7"
        )
        return Group(prompt=prompt, samples=samples, scores=scores)

    return make
