"""Bodies of the HTTP API, as SGLang 0.5.23 defines them; msgspec checks types and unknown keys.

A field of SGLang that this engine does not implement is listed with its neutral value and refused
when it has another one: a request is never answered as if it had asked for something else.
"""

import secrets
from typing import Any, Literal

import msgspec

from r1mega.rollout.engine.requests import Asked, Completion, Finish


class SamplingParams(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Unknown keys are an error: a misspelt one would sample from another distribution."""

    max_new_tokens: int | None = 128
    temperature: float | None = 1.0
    top_p: float | None = 1.0
    top_k: int | None = -1
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = False
    sampling_seed: int | None = None
    skip_special_tokens: bool | None = True
    no_stop_trim: bool | None = False
    # Without effect on token ids.
    spaces_between_special_tokens: bool | None = True
    stream_interval: int | None = None
    custom_params: Any = None
    # Not implemented; accepted at their default.
    n: int | None = 1
    min_new_tokens: int | None = 0
    min_p: float | None = 0.0
    stop: str | list[str] | None = None
    stop_regex: str | list[str] | None = None
    frequency_penalty: float | None = 0.0
    presence_penalty: float | None = 0.0
    repetition_penalty: float | None = 1.0
    json_schema: str | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | None = None
    logit_bias: dict[str, float] | None = None
    beam_width: int | None = None
    watermark: dict[str, Any] | None = None
    choice: list[str] | None = None


_NOT_IMPLEMENTED = (
    "n",
    "min_new_tokens",
    "min_p",
    "stop",
    "stop_regex",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "json_schema",
    "regex",
    "ebnf",
    "structural_tag",
    "logit_bias",
    "beam_width",
    "watermark",
    "choice",
)


class GenerateBody(msgspec.Struct, kw_only=True, frozen=True):
    """POST /generate: one prompt, one completion."""

    input_ids: list[int] | None = None
    text: str | None = None
    rid: str | None = None
    sampling_params: SamplingParams = SamplingParams()
    return_logprob: bool | None = False
    logprob_start_len: int | None = -1
    top_logprobs_num: int | None = 0
    stream: bool | None = False
    return_routed_experts: bool = False


class PauseBody(msgspec.Struct, kw_only=True, frozen=True):
    mode: Literal["abort", "retract", "in_place"] = "abort"


class AbortBody(msgspec.Struct, kw_only=True, frozen=True):
    rid: str | None = ""
    abort_all: bool = False


class InitGroupBody(msgspec.Struct, kw_only=True, frozen=True):
    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    group_name: str = "weight_update_group"
    backend: str = "nccl"


class DestroyGroupBody(msgspec.Struct, kw_only=True, frozen=True):
    group_name: str = "weight_update_group"


class UpdateBody(msgspec.Struct, kw_only=True, frozen=True):
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    group_name: str = "weight_update_group"
    flush_cache: bool = True
    abort_all_requests: bool = False
    weight_version: str | None = None
    load_format: None = None  # one broadcast per tensor is the only format


class UpdateFromDiskBody(msgspec.Struct, kw_only=True, frozen=True):
    model_path: str
    flush_cache: bool = True
    abort_all_requests: bool = False
    weight_version: str | None = None


class WeightsCheckerBody(msgspec.Struct, kw_only=True, frozen=True):
    action: Literal["checksum"] = "checksum"


class Limits(msgspec.Struct, kw_only=True, frozen=True):
    """What a request is checked against."""

    vocab_size: int
    context_length: int
    eos_token_ids: tuple[int, ...]


def parse_generate(body: GenerateBody, limits: Limits) -> Asked:
    """Checks everything about a request; raises ValueError with one sentence."""
    prompt = _prompt(body, limits.vocab_size)
    _check_options(body)
    params = body.sampling_params
    _check_implemented(params)
    temperature = 1.0 if params.temperature is None else params.temperature
    top_p = 1.0 if params.top_p is None else params.top_p
    top_k = -1 if params.top_k is None else params.top_k
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be a non-negative finite number, got {temperature}")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if top_k != -1 and top_k < 1:
        raise ValueError(f"top_k must be -1 (off) or at least 1, got {top_k}")
    stop = {*(params.stop_token_ids or ()), *limits.eos_token_ids}
    return Asked(
        rid=body.rid or secrets.token_hex(16),
        prompt=prompt,
        max_new_tokens=_max_new_tokens(len(prompt), params.max_new_tokens, limits.context_length),
        stop_token_ids=frozenset() if params.ignore_eos else frozenset(stop),
        temperature=temperature,
        top_p=top_p,
        top_k=-1 if top_k >= limits.vocab_size else top_k,
        seed=secrets.randbits(63) if params.sampling_seed is None else params.sampling_seed,
    )


def _prompt(body: GenerateBody, vocab_size: int) -> tuple[int, ...]:
    if body.text is not None or not body.input_ids:
        raise ValueError("send the prompt as input_ids: a non-empty list of token ids")
    if min(body.input_ids) < 0 or max(body.input_ids) >= vocab_size:
        raise ValueError(f"input_ids has a token id outside [0, {vocab_size})")
    return tuple(body.input_ids)


def _check_options(body: GenerateBody) -> None:
    if body.stream:
        raise ValueError("stream is not implemented: send stream=false")
    if body.return_routed_experts:
        raise ValueError("return_routed_experts is not implemented: leave it out")
    if body.logprob_start_len is not None and body.logprob_start_len >= 0:
        raise ValueError("log-probs of the prompt are not implemented: send logprob_start_len=-1")
    if body.top_logprobs_num:
        raise ValueError("top_logprobs_num is not implemented: send 0")


def _check_implemented(params: SamplingParams) -> None:
    neutral = SamplingParams()
    for name in _NOT_IMPLEMENTED:
        value, default = getattr(params, name), getattr(neutral, name)
        if value is not None and (value or None) != (default or None):
            raise ValueError(f"sampling_params.{name}={value!r} is not implemented: leave it out")


def _max_new_tokens(num_prompt_tokens: int, asked: int | None, context_length: int) -> int:
    room = context_length - num_prompt_tokens
    if room < 1:
        raise ValueError(
            f"the prompt has {num_prompt_tokens} tokens, which leaves no room for a response in "
            f"the context length of {context_length} tokens"
        )
    if asked is None:
        return room
    if asked < 0:
        raise ValueError(f"sampling_params.max_new_tokens is {asked}, it must be at least 0")
    if asked > room:
        raise ValueError(
            f"{num_prompt_tokens} prompt tokens and {asked} new tokens exceed the context length "
            f"of {context_length} tokens: shorten the prompt or lower max_new_tokens"
        )
    return asked


def answer(completion: Completion, text: str, *, return_logprob: bool, latency_s: float) -> Any:
    """The response of /generate."""
    meta_info: dict[str, Any] = {
        "id": completion.asked.rid,
        "finish_reason": _finish_reason(completion.finish, len(completion.token_ids)),
        "prompt_tokens": len(completion.asked.prompt),
        "completion_tokens": len(completion.token_ids),
        "cached_tokens": completion.cached_tokens,
        "weight_version": completion.version,
        "weight_versions": [
            {"version": span.version, "start": span.start, "end": span.end}
            for span in completion.versions
        ],
        "e2e_latency": latency_s,
    }
    if return_logprob:
        pairs = zip(completion.logprobs, completion.token_ids, strict=True)
        meta_info["output_token_logprobs"] = [(logprob, token, None) for logprob, token in pairs]
    return {"text": text, "output_ids": completion.token_ids, "meta_info": meta_info}


def _finish_reason(finish: Finish, num_tokens: int) -> dict[str, Any]:
    if finish.kind == "stop":
        return {"type": "stop", "matched": finish.matched}
    if finish.kind == "length":
        return {"type": "length", "length": num_tokens}
    return {"type": "abort", "message": finish.message}
