"""Weights reach every engine whole or the engine is left out, whatever dies on the way."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from r1mega.rollout import control
from r1mega.rollout.fleet import Fleet
from r1mega.rollout.publish import SyncFailed, SyncReport, publish
from r1mega.rollout.publish import publish_from_all_ranks as publish_all
from r1mega.rollout.router import RouterClient
from r1mega.rollout.transfer import TransferFailed, _update_body
from r1mega.rollout.wire import digest
from tests.distributed.fleets import RunningFleet, running_fleet, wait_until, weights
from tests.distributed.launch import run_ranks

BUCKET = 50_000  # about ten buckets
CPU = torch.device("cpu")


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[RunningFleet]:
    with running_fleet(tmp_path, 2) as running:
        yield running


@pytest.fixture
def client(fleet: RunningFleet) -> Iterator[Fleet]:
    fleet_client = fleet.client()
    fleet_client.wait_ready(2, 60)
    yield fleet_client
    fleet_client.leave()


def version_of(url: str) -> str:
    return str(control.get(f"{url}/model_info", timeout_s=30)["weight_version"])


def held_by(url: str) -> dict[str, str]:
    answer = control.post(f"{url}/weights_checker", {"action": "checksum"}, timeout_s=30)
    return dict(answer["ranks"][0]["checksums"])


def digests(seed: int) -> dict[str, str]:
    return {name: digest(tensor) for name, tensor in weights(seed).items()}


def admitted(fleet: RunningFleet) -> set[str]:
    return set(RouterClient(fleet.router_url).workers())


def test_versions_and_checksums_of_two_engines(fleet: RunningFleet, client: Fleet) -> None:
    engines = client.engines()
    assert admitted(fleet) == set()
    for version in (1, 2):
        sent = weights(seed=version)
        report = publish(client, iter(sent.items()), version, BUCKET)
        assert report.engines == ("engine-0", "engine-1")
        assert report.bytes == sum(tensor.nbytes for tensor in sent.values())
        assert (report.version, report.tensors) == (version, len(sent))
        assert report.checked > 0
        for engine in engines:
            assert version_of(engine.url) == str(version)
            assert held_by(engine.url) == digests(seed=version)
        assert admitted(fleet) == {engine.url for engine in engines}


def test_group_is_kept_while_the_engines_are_the_same(fleet: RunningFleet, client: Fleet) -> None:
    publish(client, iter(weights(1).items()), 1, BUCKET)
    first = client.join(client.engines())
    publish(client, iter(weights(2).items()), 2, BUCKET)
    assert client.join(client.engines()) is first
    fleet.start_engine("engine-2")
    report = publish(client, iter(weights(3).items()), 3, BUCKET)
    assert report.engines == ("engine-0", "engine-1", "engine-2")
    assert client.join(client.engines()) is not first
    assert {version_of(engine.url) for engine in client.engines()} == {"3"}


def test_bf16_payload_is_checked_against_float32_values(client: Fleet) -> None:
    sent = {name: tensor.to(torch.bfloat16) for name, tensor in weights(1).items()}
    assert publish(client, iter(sent.items()), 1, BUCKET).checked > 0


def test_engine_dead_before_publish_is_left_out(fleet: RunningFleet, client: Fleet) -> None:
    fleet.kill("engine-0")
    report = publish(client, iter(weights(1).items()), 1, BUCKET)
    assert report.engines == ("engine-1",)
    assert admitted(fleet) == {client.engines()[1].url}


def killing_at(position: int, pid: int, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    for index, item in enumerate(weights(seed).items()):
        if index == position:
            os.kill(pid, signal.SIGKILL)
        yield item


def test_engine_killed_between_buckets(fleet: RunningFleet, client: Fleet) -> None:
    zero, one = client.engines()
    publish(client, iter(weights(1).items()), 1, BUCKET)
    stream = killing_at(20, one.pid, seed=2)
    with pytest.raises(SyncFailed, match=r"^engine-1: does not answer$"):
        publish(client, stream, 2, BUCKET)
    assert next(stream, None) is None  # read to the end: other ranks produce it with us
    assert client.holding(1) == client.holding(2) == []  # half of version 2 is no version
    report = publish(client, iter(weights(2).items()), 2, BUCKET)
    assert report.engines == ("engine-0",)
    assert held_by(zero.url) == digests(seed=2)
    assert admitted(fleet) == {zero.url}


def test_engine_killed_inside_a_broadcast(fleet: RunningFleet, client: Fleet) -> None:
    zero, one = client.engines()
    publish(client, iter(weights(1).items()), 1, BUCKET)
    os.kill(engine_process(one.pid), signal.SIGSTOP)  # it takes no more bytes
    killer = threading.Timer(3.0, os.kill, (one.pid, signal.SIGKILL))
    usable = client.usable
    client.usable = lambda: [zero, one]  # type: ignore[method-assign]  # stopped after the probe
    killer.start()
    with pytest.raises(SyncFailed):
        publish(client, iter(weights(2).items()), 2, BUCKET)
    killer.join()
    client.usable = usable  # type: ignore[method-assign]
    report = publish(client, iter(weights(2).items()), 2, BUCKET)
    assert report.engines == ("engine-0",)
    assert held_by(zero.url) == digests(seed=2)


@pytest.mark.timeout(50)  # less than the minute that rank 0 waits for engines to join
def test_engine_that_refuses_to_join_costs_no_wait(fleet: RunningFleet, client: Fleet) -> None:
    zero, one = client.engines()
    fleet.kill("engine-1")
    with pytest.raises(TransferFailed, match="did not answer") as failure:
        client.join([zero, one])
    assert list(failure.value.failures) == [one.url]


def test_engine_waiting_for_a_tensor_is_freed_when_we_close(client: Fleet) -> None:
    engines = client.engines()
    group = client.join(engines)
    urls = [engine.url for engine in engines]
    assert control.post_each(urls, "/begin_weight_update", {}, timeout_s=30) == {}
    body = _update_body([("model.norm.weight", torch.zeros(64))], group._name, 1)
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(group._announce, url, body) for url in urls]
        wait_until(lambda: all(call.running() for call in waiting))
        time.sleep(1.0)  # long enough to be inside the broadcast
        group.close()
        said = [call.result(timeout=30) for call in waiting]  # the group's timeout is 60 s
    assert all(text is not None and "broke" in text for text in said)


@pytest.mark.slow
def test_frozen_engine_costs_time_but_never_a_hang(
    fleet: RunningFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("r1mega.rollout.fleet._HEALTH_TIMEOUT_S", 2.0)
    client = fleet.client(timeout_s=2.0)
    zero, one = client.wait_ready(2, 60)
    publish(client, iter(weights(1).items()), 1, BUCKET)
    stream = stopping_at(20, engine_process(one.pid), seed=2)
    with pytest.raises(SyncFailed, match="engine-1: does not answer"):
        publish(client, stream, 2, BUCKET)
    report = publish(client, iter(weights(2).items()), 2, BUCKET)
    assert report.engines == ("engine-0",)
    assert held_by(zero.url) == digests(seed=2)


def stopping_at(position: int, pid: int, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    for index, item in enumerate(weights(seed).items()):
        if index == position:
            os.kill(pid, signal.SIGSTOP)
        yield item


def engine_process(keeper: int) -> int:
    (child,) = (
        int(path.name)
        for path in Path("/proc").glob("[0-9]*")
        if (path / "stat").exists()
        and (path / "stat").read_text().rpartition(")")[2].split()[1] == str(keeper)
    )
    return child


def test_refused_tensor_names_the_reason_and_keeps_the_old_weights(
    fleet: RunningFleet, client: Fleet
) -> None:
    publish(client, iter(weights(1).items()), 1, 1 << 30)
    wrong = {**weights(2), "model.norm.weight": torch.zeros(3)}
    with pytest.raises(SyncFailed, match=r"model.norm.weight.* has shape \[64\] here"):
        publish(client, iter(wrong.items()), 2, 1 << 30)
    assert {version_of(engine.url) for engine in client.engines()} == {"1"}
    with pytest.raises(SyncFailed, match="no engine answers"):  # both are in quarantine
        publish(client, iter(weights(2).items()), 2, BUCKET)


def test_engine_that_lost_bytes_is_found_by_its_checksums(
    client: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("r1mega.rollout.publish.digest", lambda tensor: "0" * 64)
    with pytest.raises(SyncFailed, match="engine-0: it holds other values than were sent in"):
        publish(client, iter(weights(1).items()), 1, BUCKET)
    assert client.usable() == []


def test_restarted_engine_stays_out_until_the_next_publish(
    fleet: RunningFleet, client: Fleet
) -> None:
    publish(client, iter(weights(1).items()), 1, BUCKET)
    fleet.kill("engine-0")
    fleet.start_engine("engine-0", incarnation=1)
    assert [engine.name for engine in client.admit(1)] == ["engine-1"]
    report = publish(client, iter(weights(2).items()), 2, BUCKET)
    assert report.engines == ("engine-0", "engine-1")
    assert admitted(fleet) == {engine.url for engine in client.engines()}


def test_publish_is_repeated_with_the_engines_that_are_left(
    fleet: RunningFleet, client: Fleet
) -> None:
    one = client.engines()[1]
    streams = iter([killing_at(20, one.pid, seed=2), iter(weights(2).items())])
    report = publish_all(client, lambda: next(streams), 2, BUCKET, engine_timeout_s=30, device=CPU)
    assert isinstance(report, SyncReport)
    assert report.engines == ("engine-0",)


def test_no_engine_left_is_a_clear_end(fleet: RunningFleet, client: Fleet) -> None:
    for name in fleet.engines:
        fleet.kill(name)
    with pytest.raises(SyncFailed, match=r"reached no engine in 3 attempts: 0 of 1 engines"):
        publish_all(
            client, lambda: iter(weights(1).items()), 1, BUCKET, engine_timeout_s=0.5, device=CPU
        )


def publish_on_rank(folder: str, router_url: str, victim: int) -> list[object]:
    """One learner rank of two: only rank 0 has tensors, and an engine dies in the first attempt."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=90))
    is_root = dist.get_rank() == 0
    root = Path(folder)
    client = None
    if is_root:
        client = Fleet(root / "fleet", RouterClient(router_url), logs=root / "logs", timeout_s=60)
    attempts = 0

    def stream() -> Iterator[tuple[str, torch.Tensor | None]]:
        nonlocal attempts
        attempts += 1
        for index, (name, tensor) in enumerate(weights(2).items()):
            if is_root and attempts == 1 and index == 20:
                os.kill(victim, signal.SIGKILL)
            dist.barrier()  # the stream is collective: a rank that stopped reading would hang here
            yield name, tensor if is_root else None

    report = publish_all(client, stream, 2, BUCKET, engine_timeout_s=30, device=CPU)
    if client is not None:
        client.leave()
    return [attempts, report.version, list(report.engines), report.bytes]


def test_all_learner_ranks_agree_when_a_publish_is_repeated(fleet: RunningFleet) -> None:
    zero, one = fleet.client().wait_ready(2, 60)
    results = run_ranks(
        __name__,
        "publish_on_rank",
        world=2,
        folder=str(fleet.folder),
        router_url=fleet.router_url,
        victim=one.pid,
    )
    num_bytes = sum(tensor.nbytes for tensor in weights(2).values())
    assert results == [[2, 2, ["engine-0"], num_bytes]] * 2
    assert held_by(zero.url) == digests(seed=2)
