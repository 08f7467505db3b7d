"""The routes of a real server process."""

import shutil
import signal
import subprocess
import sys
import threading
import time
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from r1mega.rollout.engine.__main__ import check_flags, parse_flags

LONG = {"max_new_tokens": 230, "ignore_eos": True}


def _generate(server: Any, prompt: Any, **params: Any) -> Any:
    body = {"input_ids": prompt, "return_logprob": True, "sampling_params": params}
    status, answer = server.call("/generate", body)
    assert status == 200, answer
    return answer


class Background:
    """A /generate call on a thread."""

    def __init__(self, server: Any, body: dict[str, Any]) -> None:
        self.answer: Any = None
        self._thread = threading.Thread(target=self._call, args=(server, body))
        self._thread.start()

    def _call(self, server: Any, body: dict[str, Any]) -> None:
        self.answer = server.call("/generate", body)

    def join(self) -> Any:
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self.answer


def _wait_for_load(server: Any, **expected: int) -> None:
    """Poll /v1/loads until the first engine shows these values."""
    deadline = time.monotonic() + 60
    while True:
        load = server.call("/v1/loads")[1]["loads"][0]
        if all(load[key] == value for key, value in expected.items()):
            return
        assert time.monotonic() < deadline, load
        time.sleep(0.005)


def _paused_with(server: Any, mode: str, num_requests: int, **body: Any) -> Background:
    """Requests that are half done and held by a pause; the engine is paused before they arrive."""
    server.call("/pause_generation", {"mode": "in_place"})
    prompts = [[3, 4, 5 + i] for i in range(num_requests)]
    call = Background(server, {"input_ids": prompts, "sampling_params": LONG, **body})
    _wait_for_load(server, num_waiting_reqs=num_requests)
    server.call("/continue_generation", {})
    _wait_for_load(server, num_running_reqs=num_requests)
    server.call("/pause_generation", {"mode": mode})
    return call


@pytest.mark.timeout(180)
def test_generate_and_state(saved: Callable, start_server: Callable):
    own = saved("yarn")
    server = start_server(own.folder, "--weight-version", "7", "--served-model-name", "tiny")
    prompt = [5, 9, 11, 3]
    single = _generate(server, prompt, max_new_tokens=20, sampling_seed=3, ignore_eos=True)
    assert single["text"] == ""
    meta = single["meta_info"]
    assert meta["finish_reason"] == {"type": "length", "length": 20}
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (4, 20)
    assert meta["weight_version"] == "7"
    assert meta["weight_versions"] == [{"version": "7", "start": 0, "end": 20}]
    logprobs, token_ids, texts = zip(*meta["output_token_logprobs"], strict=True)
    assert list(token_ids) == single["output_ids"]
    assert set(texts) == {None}
    expected = own.response_logprobs(prompt, token_ids)
    measured = torch.tensor(logprobs, dtype=torch.float64)
    torch.testing.assert_close(measured, expected, rtol=0, atol=1e-5)

    batch = _generate(server, [prompt] * 3, max_new_tokens=20, sampling_seed=3, ignore_eos=True)
    assert [one["output_ids"] for one in batch] == [single["output_ids"]] * 3
    assert batch[2]["meta_info"]["output_token_logprobs"] == meta["output_token_logprobs"]
    assert batch[0]["meta_info"]["cached_tokens"] == 3
    copies = _generate(server, prompt, max_new_tokens=20, sampling_seed=3, n=4, ignore_eos=True)
    assert copies[0]["output_ids"] == single["output_ids"]
    assert len({tuple(one["output_ids"]) for one in copies}) == 4

    for path in ("/health", "/health_generate", "/ready"):
        assert server.call(path)[0] == 200
    info = server.call("/model_info")[1]
    assert (info["weight_version"], info["served_model_name"]) == ("7", "tiny")
    assert server.call("/server_info")[1]["max_running_requests"] == 64
    assert (
        server.call("/flush_cache") == server.call("/flush_cache", {}) == (200, "Cache flushed.\n")
    )

    status, answer = server.call("/generate", b'{"input_ids": [3')
    assert status == 400
    assert "bad request body" in answer["error"]["message"]
    status, answer = server.call("/generate", {"input_ids": [3] * 256})
    assert status == 400
    assert "no room for a response" in answer["error"]["message"]
    status, answer = server.call("/pause_generation", {"mode": "sleep"})
    assert status == 400

    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 0


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_pause_abort_and_client_that_leaves(saved: Callable, start_server: Callable):
    server = start_server(saved("plain").folder, "--max-running-requests", "4")
    call = _paused_with(server, "in_place", 4, rid=["a", "b", "c", "d"])
    assert server.call("/flush_cache")[0] == 400
    assert server.call("/abort_request", {"rid": "b"})[0] == 200
    assert server.call("/abort_request", {"rid": ""})[0] == 200
    _wait_for_load(server, num_running_reqs=3)
    status, answer = server.call("/generate", {"input_ids": [3], "rid": "a"})
    assert status == 400
    assert "rid 'a' is in use" in answer["error"]["message"]
    server.call("/continue_generation", {})
    status, answers = call.join()
    kinds = [one["meta_info"]["finish_reason"]["type"] for one in answers]
    assert kinds == ["length", "abort", "length", "length"]
    partial = answers[1]["output_ids"]
    assert 0 < len(partial) == answers[1]["meta_info"]["completion_tokens"] < 230

    call = _paused_with(server, "abort", 3)
    status, answers = call.join()
    assert {one["meta_info"]["finish_reason"]["type"] for one in answers} == {"abort"}
    late = Background(server, {"input_ids": [3, 4], "sampling_params": {"max_new_tokens": 3}})
    _wait_for_load(server, num_waiting_reqs=1)
    assert server.call("/health_generate")[0] == 200
    server.call("/continue_generation", {})
    assert late.join()[0] == 200

    server.call("/pause_generation", {"mode": "in_place"})
    with pytest.raises(TimeoutError):
        server.call("/generate", {"input_ids": [3, 4], "sampling_params": LONG}, timeout_s=0.5)
    server.call("/continue_generation", {})
    _wait_for_load(server, num_total_reqs=0)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_weights_from_disk(saved: Callable, start_server: Callable, tmp_path: Path):
    old, new = saved("plain"), saved("plain", 1)
    server = start_server(old.folder, "--weight-version", "0")
    prompt = [5, 9, 11, 3]
    _generate(server, prompt, max_new_tokens=2)
    call = _paused_with(server, "retract", 2)
    body = {"model_path": str(new.folder), "weight_version": "1"}
    assert server.call("/update_weights_from_disk", body) == (
        200,
        {"success": True, "message": "Success."},
    )
    server.call("/continue_generation", {})
    for one in call.join()[1]:
        spans = one["meta_info"]["weight_versions"]
        assert [span["version"] for span in spans] == ["0", "1"]
        assert spans[0]["end"] == spans[1]["start"]
        assert spans[1]["end"] == len(one["output_ids"]) == 230
    fresh = _generate(server, prompt, max_new_tokens=20, ignore_eos=True)
    assert fresh["meta_info"]["cached_tokens"] == 0
    measured = torch.tensor([e[0] for e in fresh["meta_info"]["output_token_logprobs"]])
    expected = new.response_logprobs(prompt, fresh["output_ids"])
    torch.testing.assert_close(measured.double(), expected, rtol=0, atol=1e-5)

    # Without a pause the update waits for running requests, and later requests wait for it.
    server.call("/pause_generation", {"mode": "in_place"})
    first = Background(server, {"input_ids": [3, 4], "sampling_params": LONG})
    _wait_for_load(server, num_waiting_reqs=1)
    server.call("/continue_generation", {})
    body = {"model_path": str(old.folder), "weight_version": "2"}
    assert server.call("/update_weights_from_disk", body)[0] == 200
    assert first.join()[1]["meta_info"]["weight_versions"] == [
        {"version": "1", "start": 0, "end": 230}
    ]
    assert _generate(server, prompt, max_new_tokens=2)["meta_info"]["weight_version"] == "2"

    status, answer = server.call("/update_weights_from_disk", {"model_path": str(tmp_path)})
    assert status == 400
    assert "no model.safetensors" in answer["message"]
    row = server.call("/get_weights_by_name", {"name": "model.norm.weight", "truncate_size": 3})[1]
    assert row == old.network.model.norm.weight[:3].tolist()
    assert server.call("/get_weights_by_name?name=model.norm.weight&truncate_size=3")[1] == row
    assert server.call("/get_weights_by_name", {"name": "nothing"})[0] == 400


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_dummy_weights_tokenizer_and_api_key(
    saved: Callable, start_server: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The key comes from the environment, where our own calls take it, too."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    from r1mega.rollout import control

    shutil.copy(saved("plain").folder / "config.json", tmp_path)
    words = {f"w{i} ": i for i in range(64)}
    Tokenizer(WordLevel(words, unk_token="w0 ")).save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setenv(control.API_KEY, "secret")
    server = start_server(tmp_path, "--load-format", "dummy")
    body = {"input_ids": [3], "sampling_params": {"max_new_tokens": 200, "sampling_seed": 1}}
    assert server.call("/generate", body)[0] == 401
    assert server.call("/generate", body, Authorization="Bearer wrong")[0] == 401
    assert server.call("/generate", body, Authorization="Bearer \xff")[0] == 401
    status, answer = server.call("/generate", body, Authorization="Bearer secret")
    assert status == 200
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": 1}
    assert answer["output_ids"][-1] == 1
    assert answer["text"].split() == [f"w{i}" for i in answer["output_ids"][:-1]]
    assert "output_token_logprobs" not in answer["meta_info"]
    url = f"http://127.0.0.1:{server.port}/weights_checker"
    assert control.post(url, {"action": "checksum"}, timeout_s=20)["success"]
    monkeypatch.delenv(control.API_KEY)
    with pytest.raises(control.CallFailed, match="401"):
        control.post(url, {"action": "checksum"}, timeout_s=20)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_taken_port_is_one_sentence_and_exit_code_1(saved: Callable, start_server: Callable):
    folder = saved("plain").folder
    port = start_server(folder).port
    argv = [sys.executable, "-m", "r1mega.rollout.engine", "--model-path", str(folder)]
    argv += ["--port", str(port)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1
    expected = f"cannot listen on 127.0.0.1:{port}: Address already in use; choose another --port"
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_bad_flags_get_one_sentence(
    saved: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("R1MEGA_API_KEY", raising=False)
    folder = str(saved("plain").folder)
    for flags, message in (
        (["--model-path", folder, "--host", "0.0.0.0"], "give an --api-key as well"),
        (["--model-path", folder, "--host", "example.org"], "give an --api-key as well"),
        (["--model-path", str(tmp_path)], "has no config.json"),
        (["--model-path", folder, "--context-length", "0"], "--context-length is 0, it must be"),
    ):
        with pytest.raises(ValueError, match=message):
            check_flags(parse_flags(flags))
    check_flags(parse_flags(["--model-path", folder, "--host", "0.0.0.0", "--api-key", "k"]))
    for host in ("127.0.0.1", "::1", "localhost"):
        check_flags(parse_flags(["--model-path", folder, "--host", host]))


def test_routed_experts_are_answered_when_server_and_request_say_so(
    saved: Callable, start_server: Callable
):
    own = saved("yarn")
    body = {"input_ids": [3, 4, 5], "return_routed_experts": True}
    body["sampling_params"] = {"max_new_tokens": 20, "ignore_eos": True}
    status, answer = start_server(own.folder).call("/generate", body)
    assert status == 400
    assert "--enable-return-routed-experts" in answer["error"]["message"]
    server = start_server(own.folder, "--enable-return-routed-experts")
    for start in (0, 2):
        answer = server.call("/generate", {**body, "routed_experts_start_len": start})[1]
        expected = own.experts([3, 4, 5, *answer["output_ids"]])[start:]
        ids = np.frombuffer(b64decode(answer["meta_info"]["routed_experts"]), dtype=np.int32)
        np.testing.assert_array_equal(np.sort(ids.reshape(expected.shape)), expected.sort().values)
    assert "routed_experts" not in _generate(server, [3, 4, 5])["meta_info"]
    status, answer = server.call("/generate", {**body, "routed_experts_start_len": 4})
    assert status == 400
    assert "[0, 3]" in answer["error"]["message"]
