"""Bodies of the HTTP API, as SGLang 0.5.23 defines them; msgspec checks types and unknown keys.

A field of SGLang that this engine does not implement is listed with its neutral value and refused
when it has another one: a request is never answered as if it had asked for something else.
"""

import secrets
from base64 import b64encode
from typing import Any, Literal

import msgspec

from r1mega.rollout.engine.requests import Asked, Completion, Finish


class NotImplementedParams(msgspec.Struct, kw_only=True, frozen=True):
    """Accepted at their defaults, refused otherwise."""

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


class SamplingParams(NotImplementedParams, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Unknown keys are an error: a misspelt one would sample from another distribution."""

    max_new_tokens: int | None = 128
    min_new_tokens: int | None = 0
    temperature: float | None = 1.0
    top_p: float | None = 1.0
    top_k: int | None = -1
    min_p: float | None = 0.0
    n: int | None = 1
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = False
    sampling_seed: int | None = None
    skip_special_tokens: bool | None = True
    spaces_between_special_tokens: bool | None = True
    no_stop_trim: bool | None = False
    stream_interval: int | None = None
    custom_params: Any = None


class GenerateBody(msgspec.Struct, kw_only=True, frozen=True):
    """POST /generate. A list of prompts is answered with a list."""

    input_ids: list[int | list[int]] | None = None
    text: str | list[str] | None = None
    rid: str | list[str] | None = None
    sampling_params: SamplingParams | list[SamplingParams] | None = None
    return_logprob: bool | list[bool] | None = False
    logprob_start_len: int | list[int] | None = -1
    top_logprobs_num: int | list[int] | None = 0
    stream: bool | None = False
    return_routed_experts: bool = False
    routed_experts_start_len: int = 0


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
    load_format: Literal["flattened_bucket"] | None = None


class UpdateFromDiskBody(msgspec.Struct, kw_only=True, frozen=True):
    model_path: str
    load_format: Literal["auto"] | None = None
    flush_cache: bool = True
    abort_all_requests: bool = False
    weight_version: str | None = None


class UpdateFromPeersBody(msgspec.Struct, kw_only=True, frozen=True):
    """Of a route of ours, in place of SGLang's custom weight loader."""

    invitation: str
    flush_cache: bool = True
    abort_all_requests: bool = False
    weight_version: str | None = None


class UpdateVersionBody(msgspec.Struct, kw_only=True, frozen=True):
    new_version: str
    abort_all_requests: bool = True


class WeightsCheckerBody(msgspec.Struct, kw_only=True, frozen=True):
    action: Literal["checksum"] = "checksum"
    skip_tensor_list: list[str] | None = None


class GetWeightsBody(msgspec.Struct, kw_only=True, frozen=True):
    name: str
    truncate_size: int = 100


class Limits(msgspec.Struct, kw_only=True, frozen=True):
    """What a request is checked against."""

    vocab_size: int
    context_length: int
    eos_token_ids: tuple[int, ...]
    returns_routed_experts: bool = False


class Wanted(msgspec.Struct, kw_only=True, frozen=True):
    """One completion to draw, and how to show it."""

    asked: Asked
    return_logprob: bool
    keep_stop: bool
    skip_special: bool


def parse_generate(body: GenerateBody, limits: Limits) -> tuple[list[Wanted], bool]:
    """What is wanted, and whether the answer is a list; ValueError with one sentence."""
    prompts, is_batch = _prompts(body, limits)
    count = len(prompts)
    _check_options(body, count)
    experts_from = _experts_from(body, prompts, limits)
    wanted = [
        Wanted(
            asked=asked,
            return_logprob=return_logprob,
            keep_stop=bool(params.no_stop_trim),
            skip_special=params.skip_special_tokens is not False,
        )
        for prompt, params, return_logprob, rid in zip(
            prompts,
            _per_prompt(body.sampling_params or SamplingParams(), count, "sampling_params"),
            _per_prompt(body.return_logprob or False, count, "return_logprob"),
            _rids(body.rid, count, is_batch),
            strict=True,
        )
        for asked in _asked(prompt, params, rid, body.rid, limits, experts_from)
    ]
    if len({one.asked.rid for one in wanted}) != len(wanted):
        raise ValueError("rid has duplicates: every request needs its own")
    return wanted, is_batch or len(wanted) > 1


def _prompts(body: GenerateBody, limits: Limits) -> tuple[list[tuple[int, ...]], bool]:
    if body.text is not None or not body.input_ids:
        raise ValueError("send the prompt as input_ids: a non-empty list of token ids, or of lists")
    single = [item for item in body.input_ids if isinstance(item, int)]
    batch = [item for item in body.input_ids if isinstance(item, list)]
    if single and batch:
        raise ValueError("input_ids mixes token ids and lists of them")
    prompts = batch or [single]
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {index} of input_ids is empty")
        if min(prompt) < 0 or max(prompt) >= limits.vocab_size:
            raise ValueError(
                f"prompt {index} of input_ids has a token id outside [0, {limits.vocab_size})"
            )
    return [tuple(prompt) for prompt in prompts], bool(batch)


def _check_options(body: GenerateBody, num_prompts: int) -> None:
    if body.stream:
        raise ValueError("stream is not implemented: send stream=false")
    start_len = -1 if body.logprob_start_len is None else body.logprob_start_len
    if any(start >= 0 for start in _per_prompt(start_len, num_prompts, "logprob_start_len")):
        raise ValueError("log-probs of the prompt are not implemented: send logprob_start_len=-1")
    if any(_per_prompt(body.top_logprobs_num or 0, num_prompts, "top_logprobs_num")):
        raise ValueError("top_logprobs_num is not implemented: send 0")


def _experts_from(body: GenerateBody, prompts: list[tuple[int, ...]], limits: Limits) -> int | None:
    """The first token whose experts are wanted; None: nobody's."""
    if not body.return_routed_experts:
        return None
    if not limits.returns_routed_experts:
        raise ValueError(
            "return_routed_experts: start the engine with --enable-return-routed-experts"
        )
    start, shortest = body.routed_experts_start_len, min(map(len, prompts))
    if not 0 <= start <= shortest:
        raise ValueError(
            f"routed_experts_start_len is {start}, it must be in [0, {shortest}] (prompt tokens)"
        )
    return start


def _per_prompt(value: Any, count: int, name: str) -> list[Any]:
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} entries for {count} prompts")
    return value


def _rids(rid: str | list[str] | None, count: int, is_batch: bool) -> list[str]:
    if rid is None:
        return [secrets.token_hex(16) for _ in range(count)]
    if isinstance(rid, str):
        return [f"{rid}_{index}" for index in range(count)] if is_batch else [rid]
    return [str(one) for one in _per_prompt(rid, count, "rid")]


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"sampling_params.{name} is {value}, it must be at least {least}")


def _asked(
    prompt: tuple[int, ...],
    params: SamplingParams,
    rid: str,
    body_rid: str | list[str] | None,
    limits: Limits,
    experts_from: int | None,
) -> list[Asked]:
    """The n completions of one prompt; completion i draws from seed + i."""
    _check_implemented(params)
    temperature = 1.0 if params.temperature is None else params.temperature
    top_p = 1.0 if params.top_p is None else params.top_p
    min_p = params.min_p or 0.0
    top_k = -1 if params.top_k is None else params.top_k
    copies = 1 if params.n is None else params.n
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be a non-negative finite number, got {temperature}")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if not 0.0 <= min_p <= 1.0:
        raise ValueError(f"min_p must be in [0, 1], got {min_p}")
    if top_k != -1 and top_k < 1:
        raise ValueError(f"top_k must be -1 (off) or at least 1, got {top_k}")
    _at_least("n", copies, 1)
    stop = {*(params.stop_token_ids or ()), *limits.eos_token_ids} & set(range(limits.vocab_size))
    seed = secrets.randbits(63) if params.sampling_seed is None else params.sampling_seed
    max_new_tokens = _max_new_tokens(len(prompt), params, limits)
    return [
        Asked(
            rid=rid if copies == 1 else f"{rid}_{index}",
            parent_rid=body_rid if isinstance(body_rid, str) else rid,
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            min_new_tokens=params.min_new_tokens or 0,
            stop_token_ids=frozenset() if params.ignore_eos else frozenset(stop),
            temperature=temperature,
            top_p=top_p,
            top_k=-1 if top_k >= limits.vocab_size else top_k,
            min_p=min_p,
            seed=seed + index,
            experts_from=experts_from,
        )
        for index in range(copies)
    ]


def _check_implemented(params: SamplingParams) -> None:
    neutral = NotImplementedParams()
    for name in NotImplementedParams.__struct_fields__:
        value = getattr(params, name)
        if value and value != getattr(neutral, name):
            raise ValueError(f"sampling_params.{name}={value!r} is not implemented: leave it out")


def _max_new_tokens(num_prompt_tokens: int, params: SamplingParams, limits: Limits) -> int:
    room = limits.context_length - num_prompt_tokens
    if room < 1:
        raise ValueError(
            f"the prompt has {num_prompt_tokens} tokens, which leaves no room for a response in "
            f"the context length of {limits.context_length} tokens"
        )
    asked = room if params.max_new_tokens is None else params.max_new_tokens
    _at_least("max_new_tokens", asked, 0)
    if asked > room:
        raise ValueError(
            f"{num_prompt_tokens} prompt tokens and {asked} new tokens exceed the context length "
            f"of {limits.context_length} tokens: shorten the prompt or lower max_new_tokens"
        )
    if not 0 <= (params.min_new_tokens or 0) <= asked:
        raise ValueError(
            f"min_new_tokens must be in [0, max_new_tokens ({asked})], got {params.min_new_tokens}"
        )
    return asked


def answer(completion: Completion, text: str, *, return_logprob: bool, latency_s: float) -> Any:
    """One element of the response of /generate."""
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
    if completion.experts is not None:
        meta_info["routed_experts"] = b64encode(completion.experts).decode()
    return {"text": text, "output_ids": completion.token_ids, "meta_info": meta_info}


def _finish_reason(finish: Finish, num_tokens: int) -> dict[str, Any]:
    if finish.kind == "stop":
        return {"type": "stop", "matched": finish.matched}
    if finish.kind == "length":
        return {"type": "length", "length": num_tokens}
    return {"type": "abort", "message": finish.message}
