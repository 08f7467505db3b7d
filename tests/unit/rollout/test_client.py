"""The body we send is SGLang's; an answer that the learner must not train on never gets through."""

import base64
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from r1mega.records import Routers, VersionRange
from r1mega.rollout.client import (
    NEVER_PUBLISHED,
    AttemptFailed,
    BadExchange,
    generate_body,
    parse_version,
    read_answer,
)
from tests.unit.rollout.answers import SAMPLING, answer, request

API_TYPES = Path(sys.prefix) / "sglang-api/sglang/api/v1/api_types.py"


@pytest.fixture(scope="module")
def api_types() -> ModuleType:
    if not API_TYPES.exists():
        pytest.skip(
            f"{API_TYPES} is absent: pip install --no-deps --target "
            f"{Path(sys.prefix) / 'sglang-api'} sglang==0.5.23"
        )
    spec = importlib.util.spec_from_file_location("sglang_api_types", API_TYPES)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # msgspec resolves annotations there
    spec.loader.exec_module(module)
    return module


def test_sglang_accepts_the_body_and_reads_the_same_values(api_types: ModuleType) -> None:
    body = json.loads(json.dumps(generate_body(request(), SAMPLING)))
    parsed = api_types.GenerateRequest.from_json_value(body)
    assert parsed.input_ids == [5, 6, 7]
    assert parsed.return_logprob is True
    assert parsed.logprob_start_len == -1
    params = parsed.sampling_params
    assert (params.max_new_tokens, params.temperature) == (8, 0.7)
    assert (params.top_p, params.top_k) == (0.9, 20)
    assert params.stop_token_ids == [1, 2]
    assert params.sampling_seed == 100


def test_right_answer_becomes_a_sample() -> None:
    sample = read_answer(answer(), request(index=3))
    assert sample.uid == "p/1#3"
    assert (sample.prompt_uid, sample.index) == ("p/1", 3)
    assert sample.token_ids == (8, 9, 1)
    assert sample.sampler_logprobs == (-0.5, -0.25, -2.0)
    assert sample.finish_reason == "stop"
    assert sample.versions == (VersionRange(version=7, start=0, end=3),)


def test_versions_in_ranges_and_as_one_label() -> None:
    ranges = [{"version": "6", "start": 0, "end": 2}, {"version": "7", "start": 2, "end": 3}]
    sample = read_answer(answer(weight_versions=ranges), request())
    assert [(part.version, part.start, part.end) for part in sample.versions] == [
        (6, 0, 2),
        (7, 2, 3),
    ]
    sample = read_answer(answer(weight_versions=None), request())
    assert sample.versions == (VersionRange(version=7, start=0, end=3),)
    assert parse_version("12") == 12
    assert parse_version("default") == NEVER_PUBLISHED


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_token_logprobs": [[-0.5, 8, None]]}, "3 tokens but log-probs of 1"),
        (
            {"output_token_logprobs": [[-0.5, 8, None], [-0.5, 8, None], [-2.0, 1, None]]},
            "or of others",
        ),
        (
            {"output_token_logprobs": [[float("nan"), 8, None], [-1, 9, None], [-2, 1, None]]},
            "not a finite number",
        ),
        ({"weight_versions": [{"version": "7", "start": 0, "end": 2}]}, "but weight versions"),
        ({"weight_versions": [{"version": "7", "start": 1, "end": 3}]}, "but weight versions"),
        ({"finish_reason": None}, "not that of /generate"),
        ({"output_token_logprobs": None}, "not that of /generate"),
    ],
)
def test_wrong_answer_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadExchange, match=message):
        read_answer(answer(**changes), request())


def test_answer_without_tokens_is_refused() -> None:
    empty = answer(output_token_logprobs=[], weight_versions=[])
    with pytest.raises(BadExchange, match="p/1#0 has no token"):
        read_answer({**empty, "output_ids": []}, request())


def test_abort_may_be_tried_again() -> None:
    with pytest.raises(AttemptFailed, match="aborted p/1#0"):
        read_answer(answer(finish_reason={"type": "abort", "message": "x"}), request())


ROUTERS = Routers(num_layers=3, num_dense_layers=1, topk=2, num_experts=300)
NUM_TOKENS = 6  # three of the prompt, three of the response


def encoded(ids: Any) -> str:
    return base64.b64encode(np.ascontiguousarray(ids, dtype="<i4").tobytes()).decode()


def recorded() -> Any:
    """[tokens - 1, layers, topk]; the dense layer's are zero."""
    ids = np.arange((NUM_TOKENS - 1) * 3 * 2).reshape(NUM_TOKENS - 1, 3, 2)[..., ::-1].copy()
    ids[:, 0] = 0
    return ids


def test_routed_experts_are_asked_for_and_kept_in_order_without_dense_layers() -> None:
    assert generate_body(request(), replace(SAMPLING, routers=ROUTERS))["return_routed_experts"]
    assert "return_routed_experts" not in generate_body(request(), SAMPLING)
    ids = recorded()
    for num_experts, dtype in ((256, "uint8"), (257, "int16")):
        routers = replace(ROUTERS, num_experts=num_experts)
        sample = read_answer(answer(routed_experts=encoded(ids)), request(), routers)
        assert sample.routed_experts is not None
        assert sample.routed_experts.dtype == dtype
        kept = np.frombuffer(sample.routed_experts.ids, dtype).reshape(NUM_TOKENS - 1, 2, 2)
        assert (kept == ids[:, 1:]).all()
    assert read_answer(answer(), request()).routed_experts is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids: None, "has no meta_info.routed_experts: have the engine started with"),
        (lambda ids: "?", "has routed_experts that are not base64 of int32"),
        (lambda ids: "QUJD", "has routed_experts that are not base64 of int32"),
        (lambda ids: encoded(ids[1:]), "has 24 expert ids, but 6 tokens have 30"),
        (lambda ids: encoded(ids * 20), "has expert ids from 40 to 580, but the model has 300"),
        (lambda ids: encoded(-ids), "has expert ids from -29 to -2"),
        (lambda ids: encoded(ids // 2), "has a token with the same expert twice in one layer"),
    ],
)
def test_experts_that_routers_cannot_have_chosen_are_refused(change: Any, message: str) -> None:
    meta = answer(routed_experts=change(recorded()))
    with pytest.raises(BadExchange, match=f"the answer for p/1#0 {message}"):
        read_answer(meta, request(), ROUTERS)
