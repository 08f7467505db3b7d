"""One attempt at one sample: POST /generate in the form of SGLang 0.5.23.

Invariant: a ``Sample`` that leaves here has one finite log-prob per token and version ranges that
cover its tokens; anything else is an error, because the learner would train on it in silence.
"""

import math
from typing import Any

import aiohttp

from r1mega.records import (
    FinishReason,
    RoutedExperts,
    Routers,
    Sample,
    SampleRequest,
    Sampling,
    VersionRange,
)
from r1mega.rollout import control
from r1mega.rollout.routed_experts import read_routed_experts
from r1mega.rollout.router import ROUTING_KEY

NEVER_PUBLISHED = -1  # such an engine calls its weights "default"
_TRY_AGAIN = {408, 429}  # and every 5xx


class AttemptFailed(Exception):
    """This attempt brought no sample; another one may."""


class BadExchange(RuntimeError):
    """The engine refused the request or answered outside the protocol: trying again is no use."""


async def generate(
    session: aiohttp.ClientSession,
    url: str,
    request: SampleRequest,
    sampling: Sampling,
    *,
    routing_key: str | None = None,
) -> Sample:
    """Draw ``request`` from the engine or router at ``url``."""
    headers = control.authorization()
    if routing_key is not None:
        headers[ROUTING_KEY] = routing_key
    body = generate_body(request, sampling)
    try:
        async with session.post(f"{url}/generate", json=body, headers=headers) as response:
            if response.status != 200:
                raise _refusal(response.status, await response.text(), request)
            answer = await response.json()
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise AttemptFailed(
            f"{url} did not answer: {str(error) or type(error).__name__}"
        ) from error
    return read_answer(answer, request, sampling.routers)


def generate_body(request: SampleRequest, sampling: Sampling) -> dict[str, Any]:
    """The JSON of POST /generate. No ``rid``: the router's own retries would repeat it."""
    recorded = {} if sampling.routers is None else {"return_routed_experts": True}
    return recorded | {
        "input_ids": list(request.prompt.token_ids),
        "sampling_params": {
            "max_new_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "stop_token_ids": list(sampling.stop_token_ids),
            "sampling_seed": request.seed,
        },
        "return_logprob": True,
        "logprob_start_len": -1,  # of the response only
        "stream": False,
    }


def read_answer(answer: Any, request: SampleRequest, routers: Routers | None = None) -> Sample:
    """The sample in a 200 answer, with the experts of ``routers``; an aborted one is an
    ``AttemptFailed``."""
    try:
        token_ids = tuple(answer["output_ids"])
        meta = answer["meta_info"]
        reason: FinishReason = meta["finish_reason"]["type"]
        scored = [(float(entry[0]), entry[1]) for entry in meta["output_token_logprobs"]]
        text = answer["text"]
        versions = _versions(meta, len(token_ids))
    except (KeyError, TypeError, IndexError, ValueError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise BadExchange(
            f"the answer for {request.uid} is not that of /generate ({problem})"
        ) from error
    if reason == "abort":
        raise AttemptFailed(f"the engine aborted {request.uid}: {meta['finish_reason']}")
    _check(request.uid, token_ids, scored, versions)
    return Sample(
        uid=request.uid,
        prompt_uid=request.prompt.uid,
        index=request.index,
        token_ids=token_ids,
        sampler_logprobs=tuple(logprob for logprob, _ in scored),
        text=text,
        finish_reason=reason,
        versions=versions,
        routed_experts=_routed_experts(meta, request, len(token_ids), routers),
    )


def parse_version(text: str) -> int:
    """``"7"`` -> 7."""
    return int(text) if text.isdecimal() else NEVER_PUBLISHED


def _versions(meta: dict[str, Any], num_tokens: int) -> tuple[VersionRange, ...]:
    ranges = meta.get("weight_versions") or [
        {"version": meta["weight_version"], "start": 0, "end": num_tokens}
    ]
    return tuple(
        VersionRange(version=parse_version(part["version"]), start=part["start"], end=part["end"])
        for part in ranges
    )


def _routed_experts(
    meta: dict[str, Any], request: SampleRequest, num_tokens: int, routers: Routers | None
) -> RoutedExperts | None:
    if routers is None:
        return None
    total = len(request.prompt.token_ids) + num_tokens
    try:
        return read_routed_experts(meta.get("routed_experts"), total, routers)
    except ValueError as error:
        raise BadExchange(f"the answer for {request.uid} {error}") from error


def _check(
    uid: str,
    token_ids: tuple[int, ...],
    scored: list[tuple[float, int]],
    versions: tuple[VersionRange, ...],
) -> None:
    if not token_ids:
        raise BadExchange(f"the answer for {uid} has no token")
    if tuple(token for _, token in scored) != token_ids:
        raise BadExchange(
            f"the answer for {uid} has {len(token_ids)} tokens but log-probs of {len(scored)} "
            "tokens, or of others"
        )
    if not all(math.isfinite(logprob) for logprob, _ in scored):
        raise BadExchange(f"the answer for {uid} has a log-prob that is not a finite number")
    edges = [0, *(part.end for part in versions)]
    if [part.start for part in versions] != edges[:-1] or edges[-1] != len(token_ids):
        raise BadExchange(
            f"the answer for {uid} has {len(token_ids)} tokens but weight versions {versions}"
        )


def _refusal(status: int, text: str, request: SampleRequest) -> AttemptFailed | BadExchange:
    said = f"{status}: {text.strip()[:300]}"
    if status >= 500 or status in _TRY_AGAIN:
        return AttemptFailed(f"the answer for {request.uid} was {said}")
    return BadExchange(f"the engine refused {request.uid} with {said}")
