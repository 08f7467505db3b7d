"""Ask every engine for a few tokens and have the learner score them again.

It finds what checksums of parameters cannot see: MLA's absorbed matrices, keys and values of the
old weights in a prefix cache, another rope. The prompts are the same after every sync, so that a
cache that was not flushed answers.

Near-ties between experts fall differently in two implementations now and then, which moves the
log-probs behind them. So an engine is judged by the median over prompts of the mean difference: a
fault of weights or cache shows in all of them.
"""

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from statistics import mean, median_low

from r1mega.parallel.collectives import Team
from r1mega.records import Batch, Prompt, SampleRequest, Sampling, Sequence
from r1mega.rollout import client, control
from r1mega.rollout.carrier import Failures
from r1mega.rollout.client import AttemptFailed, BadExchange
from r1mega.rollout.control import CallFailed
from r1mega.rollout.fleet import EngineHandle

_PROMPTS = 4
_PROMPT_TOKENS = 32
_DRAWN_TOKENS = 8
_TIMEOUT_S = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Draws:
    """What engines said, by URL: whole sequences with the engine's log-probs, or a failure."""

    sequences: dict[str, list[Sequence]] = field(default_factory=dict)
    failures: Failures = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """``logprobs`` is the learner's: of the targets of a batch, on all its ranks together."""

    logprobs: Callable[[Batch], list[tuple[float, ...]]]
    team: Team
    vocab_size: int
    temperature: float
    tolerance: float
    max_tokens: int = _PROMPT_TOKENS + _DRAWN_TOKENS  # of prompt and response together
    least_sequences: int = 1  # that every rank of the learner has something to do

    def check(
        self, engines: tuple[EngineHandle, ...], version: int
    ) -> tuple[dict[str, float], Failures]:
        """By URL: every engine's difference, and what is wrong. Collective; on rank 0 alone there
        is something in it."""
        draws = self.team.told(
            self._ask_all(engines, version) if self.team.is_root else _Draws(), _Draws
        )
        rows = [(url, sequence) for url, drawn in draws.sequences.items() for sequence in drawn]
        if not rows:
            return {}, draws.failures
        scored = self._score([sequence for _, sequence in rows])
        by_engine: dict[str, list[float]] = {}
        for (url, sequence), logprobs in zip(rows, scored, strict=True):
            pairs = zip(logprobs, sequence.sampler_logprobs, strict=True)
            by_engine.setdefault(url, []).append(mean(abs(a - b) for a, b in pairs))
        differences = {url: median_low(found) for url, found in by_engine.items()}
        wrong = {
            url: self._complaint(found)
            for url, found in differences.items()
            if not found <= self.tolerance
        }
        return differences, draws.failures | wrong

    def _complaint(self, difference: float) -> str:
        return (
            f"its log-probs differ from the learner's by {difference:.1e} on average, above the "
            f"{self.tolerance:.1e} of rollout.probe_tolerance: weights, what is derived from them "
            "or its prefix cache are not those of this version, or it computes another network"
        )

    def _score(self, sequences: list[Sequence]) -> list[tuple[float, ...]]:
        repeats = -(-self.least_sequences // len(sequences))
        return self.logprobs(Batch(tuple(sequences * repeats)))[: len(sequences)]

    def _ask_all(self, engines: tuple[EngineHandle, ...], version: int) -> _Draws:
        draws = _Draws()
        with ThreadPoolExecutor(_PROMPTS * len(engines)) as pool:
            asked = [
                (engine, pool.submit(self._ask, engine, version, number))
                for engine in engines
                for number in range(_PROMPTS)
            ]
        for engine, answer in asked:
            if isinstance(drawn := answer.result(), str):
                draws.failures[engine.url] = drawn
            else:
                draws.sequences.setdefault(engine.url, []).append(drawn)
        return draws

    def _ask(self, engine: EngineHandle, version: int, number: int) -> Sequence | str:
        """One drawn sequence, or why there is none."""
        request, sampling = self._request(version, number)
        body = client.generate_body(request, sampling)
        body["sampling_params"]["ignore_eos"] = True
        try:
            answer = control.post(f"{engine.url}/generate", body, timeout_s=_TIMEOUT_S)
            sample = client.read_answer(answer, request)
        except (CallFailed, AttemptFailed, BadExchange) as error:
            return f"it did not answer a probe: {error}"
        if (versions := {part.version for part in sample.versions}) != {version}:
            return f"it answers from weights {sorted(versions)} instead of version {version}"
        prompt = request.prompt.token_ids
        return Sequence(
            uid=f"{engine.name}/{number}",
            token_ids=(*prompt, *sample.token_ids),
            start=len(prompt),
            sampler_logprobs=sample.sampler_logprobs,
        )

    def _request(self, version: int, number: int) -> tuple[SampleRequest, Sampling]:
        """Prompts never change, seeds do: other tokens are drawn each time."""
        drawn_tokens = min(_DRAWN_TOKENS, self.max_tokens // 2)
        prompt_tokens = min(_PROMPT_TOKENS, self.max_tokens - drawn_tokens)
        draw = random.Random(f"probe/{number}")
        token_ids = tuple(draw.randrange(self.vocab_size) for _ in range(prompt_tokens))
        prompt = Prompt(uid=f"probe/{number}", text="", token_ids=token_ids, question="", answer="")
        request = SampleRequest(prompt=prompt, index=0, seed=_PROMPTS * version + number)
        return request, Sampling(
            temperature=self.temperature, max_tokens=drawn_tokens, stop_token_ids=()
        )
