"""Requests and answers of /generate for tests."""

from typing import Any

from r1mega.records import Prompt, SampleRequest, Sampling

SAMPLING = Sampling(temperature=0.7, top_p=0.9, top_k=20, max_tokens=8, stop_token_ids=(1, 2))


def request(index: int = 0, prompt: str = "p/1") -> SampleRequest:
    record = Prompt(uid=prompt, text="q", token_ids=(5, 6, 7), question="q", answer="a")
    return SampleRequest(prompt=record, index=index, seed=100 + index)


def answer(version: str = "7", **changes: Any) -> dict[str, Any]:
    """A right answer of three tokens, with ``changes`` to its meta_info."""
    meta = {
        "finish_reason": {"type": "stop", "matched": 1},
        "output_token_logprobs": [[-0.5, 8, None], [-0.25, 9, None], [-2.0, 1, None]],
        "weight_version": version,
        "weight_versions": [{"version": version, "start": 0, "end": 3}],
    }
    return {"text": "xy", "output_ids": [8, 9, 1], "meta_info": {**meta, **changes}}
