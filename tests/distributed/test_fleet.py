"""Sampling from real engines behind the real router, also while an engine dies."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from r1mega.records import Sampling
from r1mega.rollout.fleet import FleetNotReady
from r1mega.rollout.router import RouterClient
from r1mega.rollout.sampler import HttpSampler, SamplingFailed
from tests.distributed.fleets import SAMPLING, RunningFleet, requests, running_fleet
from tests.distributed.publishing import Source, broadcast, publisher

LONG = Sampling(temperature=1.0, max_tokens=80, stop_token_ids=())


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[RunningFleet]:
    with running_fleet(tmp_path, 2) as running:
        yield running


def make_sampler(fleet: RunningFleet, **changes: object) -> HttpSampler:
    settings = {"concurrency": 32, "timeout_s": 60.0, "max_retries": 8, "expected_version": 1}
    return HttpSampler(url=fleet.router_url, **{**settings, **changes})  # type: ignore[arg-type]


def publish_once(fleet: RunningFleet, version: int = 1) -> None:
    client = fleet.client()
    client.wait_ready(2, 60)
    published = publisher(client, broadcast(Source(seed=version)))
    published.publish(version)
    published.close()


def test_same_seeds_give_the_same_samples_in_request_order(fleet: RunningFleet) -> None:
    publish_once(fleet)
    asked = requests(num_prompts=8, per_prompt=4)
    sampler = make_sampler(fleet)
    first = sampler(asked, SAMPLING)
    assert [sample.uid for sample in first] == [request.uid for request in asked]
    assert {part.version for sample in first for part in sample.versions} == {1}
    assert len({sample.token_ids for sample in first}) > 16  # seeds matter
    again = sampler(list(reversed(asked)), SAMPLING)
    alone = make_sampler(fleet, concurrency=1)(asked[5:8], SAMPLING)
    assert list(reversed(again)) == first
    assert alone == first[5:8]


def test_engine_killed_in_a_step_changes_nothing(fleet: RunningFleet) -> None:
    publish_once(fleet)
    asked = requests(num_prompts=16, per_prompt=4)
    expected = make_sampler(fleet)(asked, LONG)

    def kill_after_a_quarter(done: int, total: int) -> None:
        if done == total // 4:
            os.kill(fleet.engines["engine-1"].pid, signal.SIGKILL)

    sampler = make_sampler(fleet, progress=kill_after_a_quarter)
    assert sampler(asked, LONG) == expected


def test_death_of_all_engines_is_a_clear_end(fleet: RunningFleet) -> None:
    publish_once(fleet)

    def kill_all(done: int, total: int) -> None:
        if done == 1:
            for engine in fleet.engines.values():
                os.kill(engine.pid, signal.SIGKILL)

    sampler = make_sampler(fleet, progress=kill_all, max_retries=3)
    with pytest.raises(SamplingFailed, match=r"failed 3 times .*; the last time: .* 50[023]"):
        sampler(requests(num_prompts=16, per_prompt=4), LONG)


def test_stale_engine_in_the_router_is_not_believed(fleet: RunningFleet) -> None:
    """An engine restarted behind the router's back answers from weights nobody published."""
    publish_once(fleet)
    expected = make_sampler(fleet)(requests(num_prompts=8, per_prompt=4), SAMPLING)
    fleet.start_engine("engine-2")
    router = RouterClient(fleet.router_url)
    router.forward_exactly_to({engine.url for engine in fleet.client().engines()})
    sampler = make_sampler(fleet, max_retries=20)
    # other names: the router sends a prompt it knows where it sent it before
    samples = sampler(requests(num_prompts=8, per_prompt=4, name="q"), SAMPLING)
    assert [sample.token_ids for sample in samples] == [sample.token_ids for sample in expected]
    assert sampler.stats().stale > 0


def test_router_forwards_to_exactly_the_admitted(fleet: RunningFleet) -> None:
    client = fleet.client()
    zero, one = client.wait_ready(2, 60)
    router = RouterClient(fleet.router_url)
    assert router.workers() == {}
    client.set_version([zero], 4)
    client.set_version([one], 3)
    assert client.admit(4) == [zero]
    assert set(router.workers()) == {zero.url}
    client.set_version([one], 4)
    assert client.admit(4) == [zero, one]
    assert set(router.workers()) == {zero.url, one.url}
    client.quarantine(zero, "test")
    assert client.admit(4) == [one]
    assert set(router.workers()) == {one.url}
    assert client.usable() == [one]


def test_missing_engine_is_named_with_the_end_of_its_log(fleet: RunningFleet) -> None:
    (fleet.folder / "logs" / "engine-2.log").write_text("Traceback\nout of memory\n")
    with pytest.raises(FleetNotReady, match=r"2 of 3 engines .*missing: engine-2") as failure:
        fleet.client().wait_ready(3, 0.5)
    assert "out of memory" in str(failure.value)


def test_sampler_ends_when_the_router_dies(fleet: RunningFleet) -> None:
    publish_once(fleet)
    killer = threading.Timer(0.2, os.kill, (fleet.router.pid, signal.SIGKILL))
    killer.start()
    with pytest.raises(SamplingFailed, match="did not answer"):
        make_sampler(fleet, max_retries=3)(requests(num_prompts=64, per_prompt=8), LONG)
    killer.join()
