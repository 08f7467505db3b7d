"""A request inside the engine: what was asked, what was drawn, under which weights."""

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """One completion to draw; validated against the model and the context length."""

    rid: str
    parent_rid: str  # the rid of the HTTP request: aborting it aborts all its completions
    prompt: tuple[int, ...]
    max_new_tokens: int
    min_new_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()  # includes the model's end unless ignored
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    seed: int = 0
    experts_from: int | None = None  # answer which experts the tokens from here on went to


@dataclass(frozen=True, kw_only=True, slots=True)
class Finish:
    """Why a completion ended. ``matched`` is the stop token."""

    kind: Literal["stop", "length", "abort"]
    matched: int | None = None
    message: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class VersionSpan:
    """Response tokens [start, end) were drawn from weights labelled ``version``."""

    version: str
    start: int
    end: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """The answer to ``Asked``."""

    asked: Asked
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Finish
    cached_tokens: int
    version: str  # of the weights when it finished
    versions: tuple[VersionSpan, ...]
    experts: bytes | None = None  # int32 (token, layer, expert), without the last token


@dataclass(eq=False, slots=True)
class Request:
    """A completion in progress. While it runs, its tokens are in its slot (see slots.py)."""

    asked: Asked
    future: "Future[Completion]"
    tokens: list[int] = field(default_factory=list)  # prompt, then response
    logprobs: list[float] = field(default_factory=list)
    cached_tokens: int = 0
    past_versions: list[tuple[str, int]] = field(default_factory=list)  # (version, its end)

    def record_version_change(self, old: str) -> None:
        """To be called with ``logprobs`` up to date."""
        if self.logprobs:
            self.past_versions.append((old, len(self.logprobs)))

    def complete(self, finish: Finish, version: str, experts: bytes | None) -> Completion:
        response = self.tokens[len(self.asked.prompt) :]
        return Completion(
            asked=self.asked,
            token_ids=tuple(response),
            logprobs=tuple(self.logprobs),
            finish=finish,
            cached_tokens=self.cached_tokens,
            version=version,
            versions=version_spans([*self.past_versions, (version, len(response))]),
            experts=experts,
        )


def version_spans(ends: list[tuple[str, int]]) -> tuple[VersionSpan, ...]:
    """Spans from (version, end) in order; empty ones vanish and equal neighbours merge."""
    spans: list[VersionSpan] = []
    start = 0
    for version, end in ends:
        if end == start:
            continue
        if spans and spans[-1].version == version:
            start = spans.pop().start
        spans.append(VersionSpan(version=version, start=start, end=end))
        start = end
    return tuple(spans)
