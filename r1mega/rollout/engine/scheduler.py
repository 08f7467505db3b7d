"""Continuous batching: which tokens of which requests make up the next forward.

Every step takes one token of each decoding request and fills up with prompt tokens in chunks of at
most ``prefill_tokens``. Requests are admitted in order of arrival while slots are free; further
samples of a prompt that is being computed wait for it and start from its cache rows. None of this
changes a request's tokens or log-prob bits (see network.py), only their order in time.
"""

from collections import deque
from typing import Literal

import numpy as np
import torch

from r1mega.rollout.engine.cache import Cache
from r1mega.rollout.engine.network import Network
from r1mega.rollout.engine.plan import plan
from r1mega.rollout.engine.requests import Finish, Request
from r1mega.rollout.engine.sampling import Drawn, draw
from r1mega.rollout.engine.slots import Slots

PauseMode = Literal["abort", "retract", "in_place"]
_BROKEN = Finish(kind="abort", message="the logits are not finite numbers: the weights are broken")


class Scheduler:
    """Owns all requests and the cache; runs on one thread."""

    def __init__(
        self,
        network: Network,
        cache: Cache,
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
        self.running: list[Request] = []  # by slot
        self.waiting: deque[Request] = deque()
        self._slots = Slots(cache.num_slots, cache.num_positions, network.model.vocab_size)

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
        slots = self._slots
        chunks = slots.chunks(self._prefill_tokens)
        step = plan(slots["tokens"], chunks)
        hidden_ND = self._network.forward(step, self._cache)
        slots["num_computed"][chunks.slots_R] += chunks.counts_R
        is_drawing_R = (slots["num_computed"] == slots["num_tokens"])[chunks.slots_R]
        if not is_drawing_R.any():
            return
        drawing = chunks.slots_R[is_drawing_R]
        self._keep_prefixes(drawing)
        last_rows = chunks.counts_R.cumsum()[is_drawing_R] - 1
        logits_NV = self._network.logits(hidden_ND, torch.from_numpy(last_rows))
        self._append(drawing, draw(logits_NV[: len(drawing)], slots.choices(drawing)))

    def _admit(self) -> None:
        if not self.waiting or len(self.running) == self._cache.num_slots:
            return
        slots = self._slots
        computing = np.flatnonzero(slots["num_computed"] < slots["num_prompt"]).tolist()
        in_progress = {self.running[slot].asked.prompt for slot in computing}
        delayed: list[Request] = []
        while self.waiting and len(self.running) < self._cache.num_slots:
            request = self.waiting.popleft()
            prompt = request.asked.prompt
            if self._reuse_prefixes and prompt in in_progress:
                delayed.append(request)
                continue
            if self._reuse_prefixes:
                request.cached_tokens = self._cache.copy_prefix(prompt, slots.count)
            slots.enter(request, request.cached_tokens)
            self.running.append(request)
            if request.cached_tokens < len(prompt) - 1:
                in_progress.add(prompt)
        self.waiting.extendleft(reversed(delayed))

    def _keep_prefixes(self, drawing: np.ndarray) -> None:
        if self._reuse_prefixes:
            is_first = self._slots["num_tokens"][drawing] == self._slots["num_prompt"][drawing]
            for slot in drawing[is_first].tolist():
                self._cache.keep_prefix(self.running[slot].asked.prompt, slot)

    def _append(self, drawing: np.ndarray, drawn: Drawn) -> None:
        is_done = self._slots.append(drawing, drawn)
        done = [self.running[slot] for slot in drawing[is_done].tolist()]
        tokens, is_finite = drawn.token_ids_N[is_done], drawn.is_finite_N[is_done]
        for request, token, finite in zip(done, tokens.tolist(), is_finite.tolist(), strict=True):
            if not finite:
                self._finish(request, _BROKEN)
            elif token in request.asked.stop_token_ids:
                self._finish(request, Finish(kind="stop", matched=token))
            else:
                self._finish(request, Finish(kind="length"))

    def _finish(self, request: Request, finish: Finish) -> None:
        """Take the request out of the engine and answer it."""
        first, experts = request.asked.experts_from, b""
        if request in self.running:
            slot = self.running.index(request)
            if first is not None:
                experts = self._cache.experts(slot, first, self._slots["num_computed"][slot])
            self._release(slot, finished=finish.kind != "abort")
        else:
            self.waiting.remove(request)
        answer = request.complete(finish, self.version, None if first is None else experts)
        request.future.set_result(answer)

    def _release(self, slot: int, *, finished: bool) -> None:
        """Free a slot; the last running request moves there."""
        self._slots.save(slot, self.running[slot])
        if not finished:
            self._cache.clear(slot)
        last = len(self.running) - 1
        if slot < last:
            self._cache.move(last, slot, self._slots["num_computed"][last])
        self._slots.leave(slot)
        self.running[slot] = self.running[last]
        self.running.pop()

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
        """abort ends everything; retract keeps tokens but no cache rows; in_place keeps both."""
        self.paused = True
        if mode == "abort":
            self.abort(None)
        elif mode == "retract":
            self.waiting.extendleft(reversed(self.running))
            while self.running:
                self._release(len(self.running) - 1, finished=False)

    def resume(self) -> None:
        self.paused = False

    def flush_cache(self) -> bool:
        """Forget prompts; refused while requests hold or (unless paused) will take cache rows."""
        if self.running or (self.waiting and not self.paused):
            return False
        self._cache.flush()
        return True

    def set_version(self, version: str) -> None:
        """Label the weights; what was drawn so far keeps the old label."""
        if version == self.version:
            return
        for slot, request in enumerate(self.running):
            self._slots.save(slot, request)
        for request in (*self.running, *self.waiting):
            request.record_version_change(self.version)
        self.version = version
