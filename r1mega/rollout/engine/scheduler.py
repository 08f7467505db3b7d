"""Continuous batching: which tokens of which requests make up the next forward.

Every step takes one token of each decoding request and fills up with prompt tokens in chunks of at
most ``prefill_tokens``. Requests are admitted in order of arrival while slots are free; further
samples of a prompt that is being computed wait for it and start from its latents. None of this
changes a request's tokens or log-prob bits (see network.py), only their order in time.
"""

from collections import deque
from dataclasses import dataclass
from typing import Literal

from r1mega.rollout.engine.cache import LatentCache
from r1mega.rollout.engine.network import Network
from r1mega.rollout.engine.requests import Finish, Request
from r1mega.rollout.engine.sampling import Drawn, draw

PauseMode = Literal["abort", "retract", "in_place"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, end) of a request in this step."""

    request: Request
    start: int
    end: int

    @property
    def draws(self) -> bool:
        """Whether its last token's logits choose the next one."""
        return self.end == len(self.request.tokens)


class Scheduler:
    """Owns all requests and the cache; runs on one thread."""

    def __init__(
        self,
        network: Network,
        cache: LatentCache,
        *,
        version: str,
        prefill_tokens: int,
        reuse_prefixes: bool = True,
    ) -> None:
        self._network = network
        self._cache = cache
        self._prefill_tokens = prefill_tokens
        self._reuse_prefixes = reuse_prefixes
        self.version = version
        self.paused = False
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()

    @property
    def can_step(self) -> bool:
        return not self.paused and bool(self.running or self.waiting)

    @property
    def idle(self) -> bool:
        return not self.running and not self.waiting

    def add(self, request: Request) -> None:
        request.tokens = list(request.asked.prompt)
        self.waiting.append(request)
        if request.asked.max_new_tokens == 0:
            self._finish(request, Finish(kind="length"))

    def step(self) -> None:
        """Admit, run one forward, draw, and finish what is done."""
        self._admit()
        chunks = self._chunks()
        token_ids: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        drawing: list[tuple[Request, int]] = []  # request, row of its last token
        for chunk in chunks:
            token_ids += chunk.request.tokens[chunk.start : chunk.end]
            slots += [chunk.request.slot] * (chunk.end - chunk.start)
            positions += range(chunk.start, chunk.end)
            if chunk.draws:
                drawing.append((chunk.request, len(token_ids) - 1))
        step = self._network.plan(token_ids, slots, positions)
        hidden_ND = self._network.forward(step, self._cache.latents)
        for chunk in chunks:
            chunk.request.num_computed = chunk.end
            if self._reuse_prefixes and chunk.draws and not chunk.request.num_drawn:
                self._cache.keep_prefix(chunk.request.asked.prompt, chunk.request.slot)
        if drawing:
            logits_NV = self._network.logits(hidden_ND, [row for _, row in drawing])
            drawn = draw(logits_NV, [request.choice() for request, _ in drawing])
            for (request, _), token in zip(drawing, drawn, strict=True):
                self._append(request, token)

    def _admit(self) -> None:
        if not self.waiting:
            return
        in_progress = {r.asked.prompt for r in self.running if r.num_computed < len(r.asked.prompt)}
        delayed: list[Request] = []
        while self.waiting and self._cache.num_free:
            request = self.waiting.popleft()
            prompt = request.asked.prompt
            if self._reuse_prefixes and prompt in in_progress:
                delayed.append(request)
                continue
            request.slot = self._cache.take_slot()
            if self._reuse_prefixes:
                request.num_computed = self._cache.copy_prefix(prompt, request.slot)
            request.cached_tokens = request.num_computed
            if request.num_computed < len(prompt) - 1:
                in_progress.add(prompt)
            self.running.append(request)
        self.waiting.extendleft(reversed(delayed))

    def _chunks(self) -> list[Chunk]:
        chunks: list[Chunk] = []
        budget = self._prefill_tokens
        for request in self.running:
            count = request.num_pending
            if count > 1:
                count = min(count, budget)
                budget -= count
            if count:
                chunks.append(Chunk(request, request.num_computed, request.num_computed + count))
        return chunks

    def _append(self, request: Request, drawn: Drawn) -> None:
        if not drawn.finite:
            message = "the logits are not finite numbers: the weights are broken"
            self._finish(request, Finish(kind="abort", message=message), poisoned=True)
            return
        request.tokens.append(drawn.token_id)
        request.logprobs.append(drawn.logprob)
        if drawn.token_id in request.asked.stop_token_ids:
            self._finish(request, Finish(kind="stop", matched=drawn.token_id))
        elif request.num_drawn == request.asked.max_new_tokens:
            self._finish(request, Finish(kind="length"))

    def _finish(self, request: Request, finish: Finish, *, poisoned: bool = False) -> None:
        """Take the request out of the engine and answer it."""
        if request.slot >= 0:
            self.running.remove(request)
            self._release(request, poisoned=poisoned)
        else:
            self.waiting.remove(request)
        request.future.set_result(request.complete(finish, self.version))

    def _release(self, request: Request, *, poisoned: bool = False) -> None:
        self._cache.release_slot(request.slot, poisoned=poisoned)
        request.slot, request.num_computed = -1, 0

    def abort(self, rid: str | None) -> int:
        """End one request (by its own or its parent's rid) or all (None); keeps what was drawn."""
        chosen = [
            request
            for request in (*self.running, *self.waiting)
            if rid is None or rid in (request.asked.rid, request.asked.parent_rid)
        ]
        for request in chosen:
            self._finish(request, Finish(kind="abort", message="aborted on request"))
        return len(chosen)

    def pause(self, mode: PauseMode) -> None:
        """abort ends everything; retract keeps tokens but no latents; in_place keeps both."""
        self.paused = True
        if mode == "abort":
            self.abort(None)
        elif mode == "retract":
            for request in self.running:
                self._release(request)
            self.waiting.extendleft(reversed(self.running))
            self.running.clear()

    def resume(self) -> None:
        self.paused = False

    def flush_cache(self) -> bool:
        """Forget prompt latents; refused while requests hold or (unless paused) will take some."""
        if self.running or (self.waiting and not self.paused):
            return False
        self._cache.flush()
        return True

    def set_version(self, version: str) -> None:
        """Label the weights; what was drawn so far keeps the old label."""
        if version != self.version:
            for request in (*self.running, *self.waiting):
                request.record_version_change(self.version)
            self.version = version
