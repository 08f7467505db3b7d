"""Weights reach every engine whole or the engine is left out, whatever dies on the way."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from r1mega.parallel.collectives import Team
from r1mega.parallel.layout import Layout
from r1mega.rollout import control
from r1mega.rollout.broadcast import Broadcast, Stream
from r1mega.rollout.carrier import Carried, CarryFailed
from r1mega.rollout.checksum import cpu_checksum
from r1mega.rollout.disk import Disk
from r1mega.rollout.fleet import EngineHandle, Fleet
from r1mega.rollout.proof import Proof
from r1mega.rollout.publish import SyncFailed
from r1mega.rollout.router import RouterClient
from r1mega.rollout.transfer import _update_body
from r1mega.weights.regions import whole
from r1mega.weights.slices import SliceReader
from tests.distributed.fleets import RunningFleet, running_fleet, wait_until, weights
from tests.distributed.launch import run_ranks
from tests.distributed.publishing import (
    Source,
    broadcast,
    checksums,
    local_weights,
    probe,
    publisher,
)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[RunningFleet]:
    with running_fleet(tmp_path, 2) as running:
        yield running


@pytest.fixture
def client(fleet: RunningFleet) -> Fleet:
    fleet_client = fleet.client()
    fleet_client.wait_ready(2, 60)
    return fleet_client


def version_of(url: str) -> str:
    return str(control.get(f"{url}/model_info", timeout_s=30)["weight_version"])


def held_by(url: str) -> dict[str, str]:
    answer = control.post(f"{url}/weights_checker", {"action": "checksum"}, timeout_s=30)
    return dict(answer["ranks"][0]["checksums"])


def digests(seed: int) -> dict[str, str]:
    return {name: cpu_checksum(tensor) for name, tensor in weights(seed).items()}


def admitted(fleet: RunningFleet) -> set[str]:
    return set(RouterClient(fleet.router_url).workers())


def test_versions_and_checksums_of_two_engines(fleet: RunningFleet, client: Fleet) -> None:
    engines = client.engines()
    assert admitted(fleet) == set()
    source = Source()
    carrier = broadcast(source)
    published = publisher(client, carrier, Proof(checksums=checksums(source)))
    for source.seed in (1, 2):
        version, sent = source.seed, source.tensors
        report = published.publish(version)
        assert report.engines == ("engine-0", "engine-1")
        assert report.bytes == 2 * sum(tensor.nbytes for tensor in sent.values())
        assert (report.version, report.point_to_point_bytes) == (version, 0)
        assert report.minimum_bytes == report.bytes  # engines of one rank want all of it
        assert 0 < report.verified < 2 * len(sent)
        for engine in engines:
            assert version_of(engine.url) == str(version)
            assert held_by(engine.url) == digests(seed=version)
        assert admitted(fleet) == {engine.url for engine in engines}
    first = carrier.join(tuple(engines))  # kept while the engines are the same
    fleet.start_engine("engine-2")
    report = published.publish(3)
    assert report.engines == ("engine-0", "engine-1", "engine-2")
    assert carrier.join(tuple(client.engines())) is not first
    assert {version_of(engine.url) for engine in client.engines()} == {"3"}


def test_bf16_payload_is_checked_against_float32_values(client: Fleet) -> None:
    class Rounded(Source):
        @property
        def tensors(self) -> dict[str, torch.Tensor]:
            return {name: tensor.bfloat16() for name, tensor in super().tensors.items()}

    source = Rounded()
    proof = Proof(checksums=checksums(source, "all"))
    report = publisher(client, broadcast(source), proof).publish(1)
    assert report.verified == 2 * len(source.tensors)


def test_engine_dead_before_publish_is_left_out(fleet: RunningFleet, client: Fleet) -> None:
    fleet.kill("engine-0")
    report = publisher(client, broadcast(Source())).publish(1)
    assert report.engines == ("engine-1",)
    assert admitted(fleet) == {client.engines()[1].url}


def interrupted(seed: int, position: int, interrupt: Callable[[], None]) -> Callable[[], Stream]:
    """Streams of which the first is interrupted, each read to its end."""
    streams = 0

    def stream() -> Stream:
        nonlocal streams
        streams += 1
        for index, item in enumerate(weights(seed).items()):
            if streams == 1 and index == position:
                interrupt()
            yield item

    return stream


def test_engine_killed_between_buckets(
    fleet: RunningFleet, client: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    zero, one = client.engines()
    publisher(client, broadcast(Source(1))).publish(1)
    stream = interrupted(2, 20, lambda: os.kill(one.pid, signal.SIGKILL))
    report = publisher(client, broadcast(stream)).publish(2)
    assert "publishing version 2 failed: engine-1: does not answer" in caplog.text
    assert client.holding(1) == []  # half of version 2 is no version
    assert report.engines == ("engine-0",)
    assert held_by(zero.url) == digests(seed=2)
    assert admitted(fleet) == {zero.url}


def test_engine_killed_inside_a_broadcast(fleet: RunningFleet, client: Fleet) -> None:
    zero, one = client.engines()
    publisher(client, broadcast(Source(1))).publish(1)
    os.kill(engine_process(one.pid), signal.SIGSTOP)  # it takes no more bytes
    killer = threading.Timer(3.0, os.kill, (one.pid, signal.SIGKILL))
    usable = client.usable

    def stopped_after_the_probe() -> list[EngineHandle]:
        client.usable = usable  # type: ignore[method-assign]
        return [zero, one]

    client.usable = stopped_after_the_probe  # type: ignore[method-assign]
    killer.start()
    report = publisher(client, broadcast(Source(2))).publish(2)
    killer.join()
    assert report.engines == ("engine-0",)
    assert held_by(zero.url) == digests(seed=2)


@pytest.mark.timeout(50)  # less than the minute that rank 0 waits for engines to join
def test_engine_that_refuses_to_join_costs_no_wait(fleet: RunningFleet, client: Fleet) -> None:
    zero, one = client.engines()
    fleet.kill("engine-1")
    with pytest.raises(CarryFailed, match="did not answer") as failure:
        broadcast(Source()).join((zero, one))
    assert list(failure.value.failures) == [one.url]


def test_engine_waiting_for_a_tensor_is_freed_when_we_close(client: Fleet) -> None:
    engines = tuple(client.engines())
    group = broadcast(Source()).join(engines)
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
    fleet: RunningFleet, client: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("r1mega.rollout.fleet._HEALTH_TIMEOUT_S", 2.0)
    zero, one = client.engines()
    publisher(client, broadcast(Source(1), timeout_s=2.0)).publish(1)
    stream = interrupted(2, 20, lambda: os.kill(engine_process(one.pid), signal.SIGSTOP))
    report = publisher(client, broadcast(stream, timeout_s=2.0)).publish(2)
    assert report.engines == ("engine-0",)
    assert held_by(zero.url) == digests(seed=2)


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
    publisher(client, broadcast(Source(1))).publish(1)
    wrong = {**weights(2), "model.embed_tokens.weight": torch.zeros(3)}  # in the first bucket
    published = publisher(client, broadcast(lambda: iter(wrong.items())))
    reason = r"every engine is in quarantine: engine-0: .*embed_tokens.* has shape \[64, 64\] here"
    with pytest.raises(SyncFailed, match=reason):
        published.publish(2)
    assert {version_of(engine.url) for engine in client.engines()} == {"1"}
    assert client.usable() == []


def test_restarted_engine_stays_out_until_the_next_publish(
    fleet: RunningFleet, client: Fleet
) -> None:
    publisher(client, broadcast(Source(1))).publish(1)
    fleet.kill("engine-0")
    fleet.start_engine("engine-0", incarnation=1)
    assert [engine.name for engine in client.admit(1)] == ["engine-1"]
    report = publisher(client, broadcast(Source(2))).publish(2)
    assert report.engines == ("engine-0", "engine-1")
    assert admitted(fleet) == {engine.url for engine in client.engines()}


def test_engine_killed_before_its_proof_is_left_out_and_none_left_is_a_clear_end(
    fleet: RunningFleet, client: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    class Deadly(Broadcast):
        def carry(self, engines: tuple[EngineHandle, ...], version: int) -> Carried:
            carried = super().carry(engines, version)
            fleet.kill("engine-1")
            return carried

    source = Source()
    deadly = Deadly(source, is_root=True, bucket_bytes=1 << 20, timeout_s=60)
    published = publisher(client, deadly, Proof(checksums=checksums(source), probe=probe(source)))
    assert published.publish(1).engines == ("engine-0",)
    assert "engine-1" in caplog.text
    assert "/weights_checker did not answer" in caplog.text
    fleet.kill("engine-0")
    published = publisher(client, broadcast(source), engine_timeout_s=0.5)
    with pytest.raises(SyncFailed, match=r"reached no engine in 3 attempts: 0 of 1 engines"):
        published.publish(1)


def publish_on_rank(folder: str, router_url: str, victim: int) -> list[object]:
    """One learner rank of two: only rank 0 has tensors, and an engine dies in the first attempt."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=90))
    is_root = dist.get_rank() == 0
    root = Path(folder)
    client = None
    if is_root:
        client = Fleet(root / "fleet", RouterClient(router_url), logs=root / "logs")
    attempts = 0

    def stream() -> Stream:
        nonlocal attempts
        attempts += 1
        for index, (name, tensor) in enumerate(weights(2).items()):
            if is_root and attempts == 1 and index == 20:
                os.kill(victim, signal.SIGKILL)
            dist.barrier()  # the stream is collective: a rank that stopped reading would hang here
            yield name, tensor if is_root else None

    published = publisher(client, broadcast(stream, is_root=is_root), team=Team(dist.group.WORLD))
    report = published.publish(2)
    published.close()
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


class Killing(Disk):
    """Kills an engine once the first folder is written."""

    victim = 0

    def _load(self, engines: tuple[EngineHandle, ...], target: Path, version: int) -> None:
        if self.victim:
            os.kill(self.victim, signal.SIGKILL)
            self.victim = 0
        super()._load(engines, target, version)


def write_on_rank(folder: str, router_url: str, victim: int) -> list[object]:
    """One learner rank of two, each with half of most tensors; an engine dies at the second."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=90))
    rank, root = dist.get_rank(), Path(folder)
    team = Team(dist.group.WORLD)
    client = None
    if rank == 0:
        client = Fleet(root / "fleet", RouterClient(router_url), logs=root / "logs")
    found: list[object] = []
    for seed in (1, 2):
        source = Source(seed)
        carrier = Killing(
            local_weights(source, Layout(world=2, tp=2), rank),
            list(source.tensors),
            folder=root / "versions",
            companions=root / "model",
            team=team,
            timeout_s=30.0,
        )
        carrier.victim = victim if rank == 0 and seed == 2 else 0
        report = publisher(client, carrier, team=team).publish(seed)
        found += [list(report.engines), sorted(path.name for path in carrier._folder.iterdir())]
    return found


def test_disk_has_only_whole_versions_and_survives_a_dead_engine(fleet: RunningFleet) -> None:
    zero, one = fleet.client().wait_ready(2, 60)
    results = run_ranks(
        __name__,
        "write_on_rank",
        world=2,
        folder=str(fleet.folder),
        router_url=fleet.router_url,
        victim=one.pid,
    )
    both = [["engine-0", "engine-1"], ["version_000001"], ["engine-0"], ["version_000002"]]
    assert results == [both] * 2
    assert held_by(zero.url) == digests(seed=2)
    with SliceReader(fleet.folder / "versions" / "version_000002") as reader:
        for name, tensor in weights(2).items():
            shape = tuple(tensor.shape)
            assert torch.equal(reader.read(name, shape, whole(shape)), tensor), name
