"""Retries, order and bounded concurrency, against servers that fail on purpose."""

import asyncio
import threading
from base64 import b64encode
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from aiohttp import web

from r1mega.records import RoutedExperts, Routers
from r1mega.rollout import sampler as sampler_module
from r1mega.rollout.client import BadExchange
from r1mega.rollout.router import ROUTING_KEY
from r1mega.rollout.sampler import HttpSampler, SamplingFailed
from r1mega.system import processes
from tests.unit.rollout.answers import SAMPLING, answer, request

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler_module, "_FIRST_PAUSE_S", 0.01)


@contextmanager
def serving(handler: Handler, path: str = "/generate") -> Iterator[str]:
    """The handler on ``path``, from a thread with a loop of its own."""
    loop = asyncio.new_event_loop()
    port = processes.free_port()

    async def start() -> web.AppRunner:
        app = web.Application()
        app.router.add_route("*", path, handler)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        return runner

    runner = loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()


def make(url: str, **changes: object) -> HttpSampler:
    settings = {"concurrency": 4, "timeout_s": 30.0, "max_retries": 4, "expected_version": 7}
    return HttpSampler(url=url, **{**settings, **changes})  # type: ignore[arg-type]


def test_order_is_that_of_the_requests_and_concurrency_is_bounded() -> None:
    running = most = 0

    async def slow_for_early_ones(http: web.Request) -> web.Response:
        nonlocal running, most
        running += 1
        most = max(most, running)
        seed = (await http.json())["sampling_params"]["sampling_seed"]
        await asyncio.sleep(0.02 if seed % 2 else 0.0)
        running -= 1
        return web.json_response({**answer(), "text": str(seed)})

    seen: list[tuple[int, int]] = []
    with serving(slow_for_early_ones) as url:
        sampler = make(url, progress=lambda done, total: seen.append((done, total)))
        samples = sampler([request(index) for index in range(20)], SAMPLING)
    assert [sample.index for sample in samples] == list(range(20))
    assert [sample.text for sample in samples] == [str(100 + index) for index in range(20)]
    assert most <= 4
    assert seen == [(done, 20) for done in range(1, 21)]
    stats = sampler.stats()
    assert (stats.response_tokens, stats.retries, stats.stale) == (60, 0, 0)


@pytest.mark.parametrize("trouble", ["500", "429", "cut", "abort", "stale", "unpublished"])
def test_one_failure_each_is_tried_again(trouble: str) -> None:
    tries: Counter[int] = Counter()
    keys: list[str | None] = []

    async def fail_first(http: web.Request) -> web.StreamResponse:
        seed = (await http.json())["sampling_params"]["sampling_seed"]
        tries[seed] += 1
        keys.append(http.headers.get(ROUTING_KEY))
        if tries[seed] > 1:
            return web.json_response(answer())
        if trouble == "cut":
            assert http.transport is not None
            http.transport.close()
        bad = {
            "abort": answer(finish_reason={"type": "abort"}),
            "stale": answer(version="6"),
            "unpublished": answer(version="default"),
        }
        if trouble in bad:
            return web.json_response(bad[trouble])
        return web.json_response({}, status=int(trouble) if trouble.isdigit() else 500)

    with serving(fail_first) as url:
        sampler = make(url)
        samples = sampler([request(index) for index in range(3)], SAMPLING)
    assert [sample.index for sample in samples] == [0, 1, 2]
    assert sampler.stats().retries == 3
    assert sampler.stats().stale == (3 if trouble in ("stale", "unpublished") else 0)
    # the first attempts share an engine; the later ones may go to another
    assert Counter(keys) == {"p/1@7": 3, None: 3}


def test_who_wants_routed_experts_asks_the_engines_the_router_knows() -> None:
    """Samples of a prompt go to one engine; what a dead one fails to answer, the other does."""
    asked: Counter[str] = Counter()

    async def engine(http: web.Request) -> web.Response:
        body = await http.json()
        assert body["return_routed_experts"] is True
        asked[http.host] += 1
        return web.json_response(answer(routed_experts=experts))

    routers = Routers(num_layers=1, num_dense_layers=0, topk=1, num_experts=8)
    experts = b64encode(bytes(5 * 4)).decode()  # five tokens, all of them to expert 0
    sampling = replace(SAMPLING, routers=routers)
    requests = [request(index, f"p/{number}") for number in range(4) for index in range(3)]
    gone = f"http://127.0.0.1:{processes.free_port()}"
    with serving(engine) as one, serving(engine) as two:
        urls = [one, two]

        async def workers(http: web.Request) -> web.Response:
            return web.json_response({"workers": [{"url": url, "id": url} for url in urls]})

        with serving(workers, "/workers") as router:
            samples = make(router)(requests, sampling)
            assert sorted(asked.values()) == [6, 6]
            assert {s.routed_experts for s in samples} == {
                RoutedExperts(dtype="uint8", ids=bytes(5))
            }
            urls[1] = gone
            sampler = make(router)
            assert len(sampler(requests, sampling)) == 12
            assert sampler.stats().retries == 6
            urls.clear()
            with pytest.raises(SamplingFailed, match="knows no engine"):
                make(router)(requests, sampling)


def test_part_of_a_sample_from_an_old_version_is_stale() -> None:
    ranges = [{"version": "6", "start": 0, "end": 2}, {"version": "7", "start": 2, "end": 3}]

    async def mixed(http: web.Request) -> web.Response:
        return web.json_response(answer(weight_versions=ranges))

    with serving(mixed) as url, pytest.raises(SamplingFailed, match=r"weights \[6, 7\] answered"):
        make(url)([request()], SAMPLING)


def test_end_after_max_retries_names_sample_and_last_error() -> None:
    async def broken(http: web.Request) -> web.Response:
        return web.json_response({"error": "no worker"}, status=503)

    with serving(broken) as url, pytest.raises(SamplingFailed) as failure:
        make(url)([request(index) for index in range(9)], SAMPLING)
    assert "sample p/1#" in str(failure.value)
    assert "failed 4 times" in str(failure.value)
    assert "503" in str(failure.value)


def test_nobody_listening_is_a_clear_end() -> None:
    url = f"http://127.0.0.1:{processes.free_port()}"
    with pytest.raises(SamplingFailed, match=r"p/1#0 failed 4 times .* did not answer"):
        make(url)([request()], SAMPLING)


def test_engine_that_never_answers_is_a_clear_end() -> None:
    async def hang(http: web.Request) -> web.Response:
        await asyncio.sleep(600)
        return web.json_response({})

    with serving(hang) as url, pytest.raises(SamplingFailed, match="TimeoutError"):
        make(url, timeout_s=0.2, max_retries=2)([request()], SAMPLING)


def test_refused_request_is_not_tried_again() -> None:
    count = 0

    async def refuse(http: web.Request) -> web.Response:
        nonlocal count
        count += 1
        return web.json_response({"error": {"message": "prompt too long"}}, status=400)

    with serving(refuse) as url, pytest.raises(BadExchange, match=r"refused p/1#0 .*too long"):
        make(url)([request()], SAMPLING)
    assert count == 1


def test_no_requests() -> None:
    assert make("http://127.0.0.1:9")([], SAMPLING) == []
