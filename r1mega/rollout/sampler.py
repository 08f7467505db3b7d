"""Draw many samples over HTTP: bounded concurrency, request order, retries that always end.

A sample depends on its seed and the weights only, so an attempt lost with its engine is drawn again
elsewhere with the same tokens. A sample from any other version than ``expected_version`` is not
accepted. Each request ends as a sample or, after ``max_retries`` attempts, as one clear error.

Requests go through the router, but for those that want routed experts: sglang-router 0.3.2 drops
that field of the body. They go straight to the engines that the router forwards to, those that the
fleet admitted.
"""

import asyncio
import logging
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import aiohttp

from r1mega.records import Sample, SampleRequest, Sampling
from r1mega.rollout import client
from r1mega.rollout.client import AttemptFailed
from r1mega.rollout.control import CallFailed
from r1mega.rollout.router import RouterClient

log = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 10.0


class SamplingFailed(RuntimeError):
    """One sentence naming the sample and the last error."""


@dataclass(kw_only=True, slots=True)
class SamplerStats:
    """Of one call of the sampler."""

    response_tokens: int = 0
    retries: int = 0
    stale: int = 0  # attempts answered from other weights than expected; part of retries
    seconds: float = 0.0


@dataclass(kw_only=True)
class HttpSampler:
    """``HttpSampler(url=..., ...)(requests, sampling)``: one sample per request, in order."""

    url: str
    concurrency: int
    timeout_s: float
    max_retries: int
    expected_version: int = 0  # set by the caller after each publish
    progress: Callable[[int, int], None] | None = None  # (samples done, samples asked for)
    _stats: SamplerStats = field(default_factory=SamplerStats, init=False)

    def __call__(self, requests: list[SampleRequest], sampling: Sampling) -> list[Sample]:
        self._stats = SamplerStats()
        started = time.monotonic()
        samples = asyncio.run(self._draw_all(requests, sampling))
        self._stats.response_tokens = sum(len(sample.token_ids) for sample in samples)
        self._stats.seconds = time.monotonic() - started
        return samples

    def stats(self) -> SamplerStats:
        """Of the last call."""
        return self._stats

    async def _draw_all(self, requests: list[SampleRequest], sampling: Sampling) -> list[Sample]:
        slots = asyncio.Semaphore(self.concurrency)
        timeout = aiohttp.ClientTimeout(total=self.timeout_s)
        connector = aiohttp.TCPConnector(limit=self.concurrency)
        turns = _turns(requests)
        num_done = 0

        async def draw(session: aiohttp.ClientSession, request: SampleRequest) -> Sample:
            nonlocal num_done
            async with slots:
                sample = await self._draw(session, request, sampling, turns[request.prompt.uid])
            num_done += 1
            if self.progress is not None:
                self.progress(num_done, len(requests))
            return sample

        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            # the first failure ends the call; asyncio.run then cancels the other requests
            return list(await asyncio.gather(*(draw(session, request) for request in requests)))

    async def _draw(
        self, session: aiohttp.ClientSession, request: SampleRequest, sampling: Sampling, turn: int
    ) -> Sample:
        failure: AttemptFailed | None = None
        for attempt in range(self.max_retries):
            if attempt > 0:
                self._stats.retries += 1
                await asyncio.sleep(min(_FIRST_PAUSE_S * 2 ** (attempt - 1), _LONGEST_PAUSE_S))
            try:
                url = self.url if sampling.routers is None else await self._engine(turn + attempt)
                return await self._attempt(session, url, request, sampling, attempt)
            except AttemptFailed as error:
                failure = error
        raise SamplingFailed(
            f"sample {request.uid} failed {self.max_retries} times (rollout.max_retries); "
            f"the last time: {failure}"
        ) from failure

    async def _engine(self, turn: int) -> str:
        """The next of the admitted engines: another one for the next attempt."""
        try:
            urls = sorted(await asyncio.to_thread(RouterClient(self.url).workers))
        except CallFailed as error:
            raise AttemptFailed(str(error)) from error
        if not urls:
            raise AttemptFailed(f"the router at {self.url} knows no engine")
        return urls[turn % len(urls)]

    async def _attempt(
        self,
        session: aiohttp.ClientSession,
        url: str,
        request: SampleRequest,
        sampling: Sampling,
        attempt: int,
    ) -> Sample:
        # Later attempts carry no key: they may go to another engine than the one that failed.
        key = f"{request.prompt.uid}@{self.expected_version}" if attempt == 0 else None
        sample = await client.generate(session, url, request, sampling, routing_key=key)
        drawn_from = {part.version for part in sample.versions}
        if drawn_from != {self.expected_version}:
            if self._stats.stale == 0:
                log.warning(
                    "an engine answered from weights %s instead of version %d; trying again",
                    sorted(drawn_from),
                    self.expected_version,
                )
            self._stats.stale += 1
            raise AttemptFailed(
                f"weights {sorted(drawn_from)} answered instead of version {self.expected_version}"
            )
        return sample


def _turns(requests: list[SampleRequest]) -> dict[str, int]:
    """Prompt uid -> its turn at the engines: its samples share one, for the sake of its prefix.

    Leaders count from numbers of their own, or all first prompts would meet at one engine.
    """
    prompts = dict.fromkeys(request.prompt.uid for request in requests)
    first = zlib.crc32(next(iter(prompts), "").encode())
    return {uid: first + number for number, uid in enumerate(prompts)}
