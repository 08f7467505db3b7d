"""Weights broadcast over gloo into real server processes, and everything that can go wrong."""

import contextlib
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from r1mega.rollout.engine.weights import allocate, checksums, load_folder
from r1mega.rollout.wire import join_group
from r1mega.system.processes import free_port
from tests.unit.rollout.engine.tools import Saved, Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


class Trainer:
    """Rank 0 of an update group with these servers."""

    def __init__(self, servers: Sequence[Server], name: str = "g") -> None:
        self.servers, self.name = servers, name
        port = free_port("127.0.0.1")
        size = 1 + len(servers)
        bodies = [
            {
                "master_address": "127.0.0.1",
                "master_port": port,
                "rank_offset": 1 + index,
                "world_size": size,
                "group_name": name,
                "backend": "gloo",
            }
            for index in range(len(servers))
        ]
        calls = self._start("/init_weights_update_group", bodies)
        self.group = join_group(
            address="127.0.0.1",
            port=port,
            rank=0,
            world_size=size,
            name=name,
            backend="gloo",
            join_timeout_s=60,
            timeout_s=60,
        )
        assert [status for status, _ in calls()] == [200] * len(servers)

    def _start(self, path: str, bodies: Sequence[Any]) -> Callable[[], list[tuple[int, Any]]]:
        answers: list[Any] = [None] * len(bodies)

        def call(index: int) -> None:
            answers[index] = self.servers[index].call(path, bodies[index])

        threads = [threading.Thread(target=call, args=(i,)) for i in range(len(bodies))]
        for thread in threads:
            thread.start()

        def join() -> list[tuple[int, Any]]:
            for thread in threads:
                thread.join(60)
            return answers

        return join

    def everywhere(self, path: str, body: Any) -> list[tuple[int, Any]]:
        return self._start(path, [body] * len(self.servers))()

    def send(self, tensors: dict[str, Tensor], **more: Any) -> list[tuple[int, Any]]:
        body = {
            "names": list(tensors),
            "dtypes": [str(t.dtype).removeprefix("torch.") for t in tensors.values()],
            "shapes": [list(t.shape) for t in tensors.values()],
            "group_name": self.name,
            **more,
        }
        calls = self._start("/update_weights_from_distributed", [body] * len(self.servers))
        if body.get("load_format") == "flattened_bucket":
            parts = [t.contiguous().flatten().view(torch.uint8) for t in tensors.values()]
            dist.broadcast(torch.cat(parts), src=0, group=self.group)
        else:
            for tensor in tensors.values():
                dist.broadcast(tensor.contiguous(), src=0, group=self.group)
        return calls()

    def close(self) -> None:
        self.everywhere("/destroy_weights_update_group", {"group_name": self.name})
        dist.destroy_process_group(self.group)


def _assert_serves(server: Server, own: Saved, version: str) -> None:
    prompt = [5, 9, 11, 3]
    params = {"max_new_tokens": 30, "temperature": 0.7, "sampling_seed": 5, "ignore_eos": True}
    body = {"input_ids": prompt, "return_logprob": True, "sampling_params": params}
    answer = server.call("/generate", body)[1]
    assert answer["meta_info"]["weight_version"] == version
    measured = torch.tensor([e[0] for e in answer["meta_info"]["output_token_logprobs"]])
    expected = own.response_logprobs(prompt, answer["output_ids"], 0.7)
    torch.testing.assert_close(measured.double(), expected, rtol=0, atol=1e-5)


def _tensors(own: Saved) -> dict[str, Tensor]:
    return load_file(own.folder / "model.safetensors")


def test_two_engines_serve_what_the_trainer_broadcast(saved: Callable, start_server: Callable):
    old, new = saved("yarn"), saved("yarn", 1)
    servers = [start_server(old.folder, "--weight-version", "0") for _ in range(2)]
    for server in servers:
        _assert_serves(server, old, "0")
    trainer = Trainer(servers)
    tensors = _tensors(new)
    assert (
        trainer.everywhere("/begin_weight_update", {})
        == [(200, {"success": True, "message": "Success."})] * 2
    )
    names = list(tensors)
    first = {name: tensors[name] for name in names[: len(names) // 2]}
    second = {name: tensors[name] for name in names[len(names) // 2 :]}
    assert [status for status, _ in trainer.send(first)] == [200, 200]
    assert servers[0].call("/model_info")[1]["weight_version"] == "0"
    assert [status for status, _ in trainer.send(second, weight_version="1")] == [200, 200]
    assert [status for status, _ in trainer.everywhere("/end_weight_update", {})] == [200, 200]
    reference = allocate(new.model)
    load_folder(reference, new.folder)
    for server in servers:
        _assert_serves(server, new, "1")
        answer = server.call("/weights_checker", {"action": "checksum"})[1]
        assert answer["ranks"][0]["checksums"] == dict(checksums(reference))

    back = _tensors(old)
    trainer.everywhere("/begin_weight_update", {})
    sent = trainer.send(back, weight_version="2", load_format="flattened_bucket")
    assert [status for status, _ in sent] == [200, 200]
    trainer.everywhere("/end_weight_update", {})
    trainer.close()
    for server in servers:
        _assert_serves(server, old, "2")


def test_refused_updates_are_drained_and_change_nothing(saved: Callable, start_server: Callable):
    old, new = saved("plain"), saved("plain", 1)
    server = start_server(old.folder, "--weight-version", "0")
    trainer = Trainer([server])
    outside = {"names": [], "dtypes": [], "shapes": [], "group_name": "g"}
    status, answer = server.call("/update_weights_from_distributed", outside)
    assert status == 400
    assert "only between /begin_weight_update and /end_weight_update" in answer["message"]
    assert server.call("/end_weight_update", {})[0] == 400
    assert server.call("/begin_weight_update", {})[0] == 200
    assert server.call("/begin_weight_update", {})[0] == 400

    good = _tensors(new)
    wrong_shape = {**good, "lm_head.weight": torch.zeros(3, 5)}
    wrong_name = {"model.bias": torch.zeros(1 << 20), **good}
    for load_format in (None, "flattened_bucket"):
        for tensors, message in (
            (wrong_shape, "'lm_head.weight' has shape [64, 64] here, the update has [3, 5]"),
            (wrong_name, "no parameter 'model.bias' in this model"),
        ):
            more = {"weight_version": "1", "load_format": load_format}
            status, answer = trainer.send(tensors, **more)[0]
            assert status == 400
            assert message in answer["message"]
    _assert_serves(server, old, "0")
    body = {**outside, "names": ["lm_head.weight"], "dtypes": ["float33"], "shapes": [[64, 64]]}
    assert server.call("/update_weights_from_distributed", body)[0] == 400
    assert server.call("/update_weights_from_distributed", {**outside, "group_name": "x"})[0] == 400

    assert trainer.send(good, weight_version="1")[0][0] == 200
    assert server.call("/end_weight_update", {})[0] == 200
    _assert_serves(server, new, "1")
    trainer.close()


def test_groups_that_cannot_be_joined_are_refused(saved: Callable, start_server: Callable):
    server = start_server(saved("plain").folder, "--dist-timeout", "2")
    body = {
        "master_address": "127.0.0.1",
        "master_port": free_port("127.0.0.1"),
        "rank_offset": 1,
        "world_size": 2,
        "backend": "gloo",
    }
    status, answer = server.call("/init_weights_update_group", body)
    assert status == 400
    assert "cannot join group 'weight_update_group'" in answer["message"]
    status, answer = server.call("/init_weights_update_group", {**body, "backend": "nccl"})
    assert "use 'gloo'" in answer["message"]
    status, answer = server.call("/init_weights_update_group", {**body, "rank_offset": 0})
    assert "rank_offset 0 must lie in [1, world_size 2)" in answer["message"]
    assert server.call("/destroy_weights_update_group", {})[0] == 400


DYING_TRAINER = """
import os, sys, threading, torch, torch.distributed as dist, urllib.request, json
from r1mega.rollout.wire import join_group
url, port = sys.argv[1], int(sys.argv[2])
def post(path, body):
    data = json.dumps(body).encode()
    return urllib.request.urlopen(urllib.request.Request(url + path, data=data), timeout=60)
def start(path, body):
    thread = threading.Thread(target=post, args=(path, body), daemon=True)
    thread.start()
    return thread
joining = start("/init_weights_update_group", dict(master_address="127.0.0.1", master_port=port,
    rank_offset=1, world_size=2, group_name="dying", backend="gloo"))
group = join_group(address="127.0.0.1", port=port, rank=0, world_size=2, name="dying",
    backend="gloo", join_timeout_s=60, timeout_s=60)
joining.join()  # only then does the engine know the group
post("/begin_weight_update", {})
start("/update_weights_from_distributed", dict(names=["model.norm.weight", "lm_head.weight"],
    dtypes=["float32"] * 2, shapes=[[64], [64, 64]], group_name="dying", weight_version="dead"))
dist.broadcast(torch.zeros(64), src=0, group=group)
os._exit(9)
"""


def test_a_trainer_that_dies_midway_leaves_the_old_weights_and_version(
    saved: Callable, start_server: Callable
):
    old, new = saved("plain"), saved("plain", 1)
    server = start_server(old.folder, "--weight-version", "0", "--dist-timeout", "60")
    argv = [sys.executable, "-c", DYING_TRAINER, server.url, str(free_port("127.0.0.1"))]
    assert subprocess.run(argv, timeout=100, check=False).returncode == 9
    _assert_serves(server, old, "0")
    assert server.call("/end_weight_update", {})[0] == 200
    assert server.call("/destroy_weights_update_group", {"group_name": "dying"})[0] == 200
    trainer = Trainer([server], "fresh")
    assert server.call("/begin_weight_update", {})[0] == 200
    assert trainer.send(_tensors(new), weight_version="1")[0][0] == 200
    assert server.call("/end_weight_update", {})[0] == 200
    trainer.close()
    _assert_serves(server, new, "1")


def test_an_engine_ends_promptly_while_it_waits_for_a_trainer(
    saved: Callable, start_server: Callable
):
    server = start_server(saved("plain").folder)
    trainer = Trainer([server])
    server.call("/begin_weight_update", {})
    body = {"names": ["model.norm.weight"], "dtypes": ["float32"], "shapes": [[64]]}
    threading.Thread(
        target=_ignore_disconnect, args=(server, {**body, "group_name": "g"}), daemon=True
    ).start()
    assert server.call("/health")[0] == 200
    server.process.terminate()
    assert server.process.wait(20) == 0
    dist.destroy_process_group(trainer.group)


def _ignore_disconnect(server: Server, body: Any) -> None:
    with contextlib.suppress(OSError):
        server.call("/update_weights_from_distributed", body)
