"""Request bodies: what is refused, in which words; and answers read by SGLang's own schema."""

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest

from r1mega.rollout.engine.messages import (
    GenerateBody,
    Limits,
    SamplingParams,
    answer,
    parse_generate,
)
from r1mega.rollout.engine.requests import Asked, Completion, Finish, version_spans

LIMITS = Limits(vocab_size=64, context_length=32, eos_token_ids=(1,))
API_TYPES = Path(os.environ.get("R1MEGA_SGLANG_API", Path(sys.prefix, "sglang-api"))).joinpath(
    "sglang/api/v1/api_types.py"
)


def _parse(body: dict[str, Any]):
    return parse_generate(msgspec.convert(body, GenerateBody), LIMITS)


@pytest.fixture(scope="module")
def api_types() -> ModuleType:
    """SGLang 0.5.23's schema, which loads without the rest of SGLang."""
    if not API_TYPES.is_file():
        pytest.skip(f"SGLang's schema is not at {API_TYPES}")
    spec = importlib.util.spec_from_file_location("sglang_api_types", API_TYPES)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its annotations are looked up by module name
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "send the prompt as input_ids"),
        ({"text": "hello"}, "send the prompt as input_ids"),
        ({"input_ids": [3, [4]]}, "mixes token ids and lists"),
        ({"input_ids": [[3], []]}, "prompt 1 of input_ids is empty"),
        ({"input_ids": [3, 64]}, r"token id outside \[0, 64\)"),
        ({"input_ids": [3], "stream": True}, "stream is not implemented"),
        ({"input_ids": [3], "logprob_start_len": 0}, "log-probs of the prompt"),
        ({"input_ids": [3], "rid": ["a", "b"]}, "rid has 2 entries for 1 prompts"),
        ({"input_ids": [[3], [4]], "rid": ["a", "a"]}, "rid has duplicates"),
        ({"input_ids": [3] * 32}, "32 tokens, which leaves no room for a response"),
    ],
)
def test_bad_bodies_get_one_sentence(body: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        _parse({"sampling_params": {"max_new_tokens": 4}, **body})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"max_new_tokens": 31},
            "2 prompt tokens and 31 new tokens exceed the context length of 32",
        ),
        ({"max_new_tokens": -1}, "max_new_tokens is -1, it must be at least 0"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, r"min_new_tokens must be in \[0, max_new"),
        ({"temperature": -0.1}, "temperature must be a non-negative finite number, got -0.1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_k": 0}, "top_k must be -1"),
        ({"min_p": 1.5}, r"min_p must be in \[0, 1\], got 1.5"),
        ({"n": 0}, "n is 0, it must be at least 1"),
        ({"stop": ["</answer>"]}, "stop=.*is not implemented"),
        ({"repetition_penalty": 1.1}, "repetition_penalty=1.1 is not implemented"),
    ],
)
def test_bad_sampling_params_get_one_sentence(params: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        _parse({"input_ids": [3, 4], "sampling_params": {"max_new_tokens": 4, **params}})


def test_unknown_sampling_params_are_refused_and_unknown_keys_beside_them_ignored():
    with pytest.raises(msgspec.ValidationError, match="unknown field `max_token`"):
        _parse({"input_ids": [3], "sampling_params": {"max_token": 4}})
    params = {"max_new_tokens": 4, "repetition_penalty": 1.0, "stop": []}
    assert _parse({"input_ids": [3], "priority": 3, "sampling_params": params})


def test_batches_copies_and_rids():
    wanted, is_list = _parse(
        {
            "input_ids": [[3, 4], [5]],
            "rid": "job",
            "return_logprob": [True, False],
            "sampling_params": [
                {"n": 2, "sampling_seed": 10, "max_new_tokens": None},
                {"max_new_tokens": 5, "ignore_eos": True, "stop_token_ids": [7]},
            ],
        }
    )
    first, second, third = (one.asked for one in wanted)
    assert is_list
    assert [one.asked.rid for one in wanted] == ["job_0_0", "job_0_1", "job_1"]
    assert {one.asked.parent_rid for one in wanted} == {"job"}
    assert (first.seed, second.seed) == (10, 11)
    assert first.max_new_tokens == 30
    assert first.stop_token_ids == {1}
    assert third.stop_token_ids == set()
    assert [one.return_logprob for one in wanted] == [True, True, False]
    _, is_list = _parse({"input_ids": [3], "sampling_params": {"max_new_tokens": 4}})
    assert not is_list


def test_version_spans_merge_and_skip_empty_ones():
    spans = version_spans([("a", 3), ("a", 5), ("b", 5), ("c", 9)])
    assert [(s.version, s.start, s.end) for s in spans] == [("a", 0, 5), ("c", 5, 9)]
    assert version_spans([("a", 0)]) == ()


@pytest.mark.parametrize(
    "finish",
    [
        Finish(kind="stop", matched=1),
        Finish(kind="length"),
        Finish(kind="abort", message="aborted on request"),
    ],
)
def test_answers_are_read_by_sglangs_schema(api_types: ModuleType, finish: Finish):
    asked = Asked(rid="r", parent_rid="r", prompt=(3, 4), max_new_tokens=2)
    completion = Completion(
        asked=asked,
        token_ids=(5, 1),
        logprobs=(-0.5, -0.25),
        finish=finish,
        cached_tokens=1,
        version="7",
        versions=version_spans([("6", 1), ("7", 2)]),
    )
    sent = msgspec.json.encode(answer(completion, "x", return_logprob=True, latency_s=0.1))
    read = api_types.GenerateResponse.from_json_value(json.loads(sent))
    assert read.output_ids == [5, 1]
    meta = read.meta_info
    assert [(e.logprob, e.token_id) for e in meta.output_token_logprobs] == [(-0.5, 5), (-0.25, 1)]
    assert [(s.version, s.start, s.end) for s in meta.weight_versions] == [("6", 0, 1), ("7", 1, 2)]
    assert (meta.id, meta.prompt_tokens, meta.cached_tokens) == ("r", 2, 1)
    expected = {"stop": "FinishStop", "length": "FinishLength", "abort": "FinishAbort"}
    assert type(meta.finish_reason).__name__ == expected[finish.kind]


def test_sampling_params_have_the_keys_of_sglangs_schema(api_types: ModuleType):
    theirs = {field.name for field in msgspec.structs.fields(api_types.SamplingParams)}
    ours = {field.name for field in msgspec.structs.fields(SamplingParams)}
    assert ours == theirs
    generate = {field.name for field in msgspec.structs.fields(GenerateBody)}
    known = {field.name for field in msgspec.structs.fields(api_types.GenerateRequest)}
    assert generate - known == {"return_routed_experts"}  # read by the server, not in the schema
