"""What running requests are doing, a row of numbers each: a step costs no Python per request.

Rows are dense: slots [0, count) are taken, and the last one moves into the place of one that
leaves, so that the requests of a step lie next to each other in the cache.

Legend: S slots, P positions, V vocabulary, R requests of a step.
"""

import numpy as np

from r1mega.rollout.engine.plan import Chunks
from r1mega.rollout.engine.requests import Request
from r1mega.rollout.engine.sampling import Choices, Drawn, stream, uniforms

_GREEDY_BELOW = 1e-6  # temperature, as in SGLang


class Slots:
    """Tokens, progress and sampling parameters of the running requests, by slot."""

    def __init__(self, num_slots: int, num_positions: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self.count = 0
        self._rows_S = np.zeros(
            num_slots,
            dtype=[
                ("tokens", np.int64, num_positions),
                ("logprobs", np.float64, num_positions),  # of the token at that position
                ("stops", np.bool_, vocab_size),
                ("num_prompt", np.int64),
                ("num_tokens", np.int64),
                ("num_computed", np.int64),  # positions [0, num_computed) are in the cache
                ("least_tokens", np.int64),  # before that many no stop token is drawn
                ("most_tokens", np.int64),
                ("stream", np.uint64),
                ("temperature", np.float32),
                ("top_p", np.float64),
                ("top_k", np.int64),
                ("min_p", np.float64),
            ],
        )

    def __getitem__(self, name: str) -> np.ndarray:
        """One number of all running requests."""
        column: np.ndarray = self._rows_S[name][: self.count]
        return column

    def enter(self, request: Request, num_computed: int) -> None:
        """Take slot ``count``."""
        asked, row = request.asked, self._rows_S[self.count]
        num_prompt, num_tokens = len(asked.prompt), len(request.tokens)
        row["tokens"][:num_tokens] = request.tokens
        row["logprobs"][num_prompt:num_tokens] = request.logprobs
        row["stops"] = False
        row["stops"][list(asked.stop_token_ids)] = True
        row["num_prompt"], row["num_tokens"] = num_prompt, num_tokens
        row["num_computed"] = num_computed
        row["least_tokens"] = num_prompt + asked.min_new_tokens
        row["most_tokens"] = num_prompt + asked.max_new_tokens
        row["stream"] = stream(asked.seed)
        row["temperature"] = 0.0 if asked.temperature < _GREEDY_BELOW else asked.temperature
        row["top_p"], row["min_p"] = asked.top_p, asked.min_p
        row["top_k"] = self._vocab_size if asked.top_k < 0 else asked.top_k
        self.count += 1

    def save(self, slot: int, request: Request) -> None:
        """Write what was drawn back to the request."""
        row = self._rows_S[slot]
        request.tokens = row["tokens"][: row["num_tokens"]].tolist()
        request.logprobs = row["logprobs"][row["num_prompt"] : row["num_tokens"]].tolist()

    def leave(self, slot: int) -> None:
        """Free the slot; the last row takes its place."""
        self.count -= 1
        self._rows_S[slot] = self._rows_S[self.count]

    def chunks(self, prompt_tokens: int) -> Chunks:
        """One token of everyone who has one to compute, at most so many of those who have more."""
        starts_R = self["num_computed"].copy()
        pending_R = self["num_tokens"] - starts_R
        prompt_R = np.where(pending_R > 1, pending_R, 0)
        left_R = prompt_tokens - (prompt_R.cumsum() - prompt_R)
        counts_R = np.where(pending_R > 1, pending_R.clip(0, left_R.clip(0)), pending_R)
        slots_R = np.flatnonzero(counts_R)
        return Chunks(slots_R, starts_R[slots_R], counts_R[slots_R])

    def choices(self, slots_R: np.ndarray) -> Choices:
        """How to draw the next token of these."""
        num_tokens_R = self["num_tokens"][slots_R]
        suppressing_R = num_tokens_R < self["least_tokens"][slots_R]
        return Choices(
            uniforms_N=uniforms(self["stream"][slots_R], num_tokens_R),
            temperatures_N=self["temperature"][slots_R],
            top_p_N=self["top_p"][slots_R],
            top_k_N=self["top_k"][slots_R],
            min_p_N=self["min_p"][slots_R],
            suppressed_NV=self["stops"][slots_R] & suppressing_R[:, None]
            if suppressing_R.any()
            else None,
        )

    def append(self, slots_R: np.ndarray, drawn: Drawn) -> np.ndarray:
        """Add the drawn tokens that are worth their name; who is done (R booleans)."""
        places = slots_R, self["num_tokens"][slots_R]
        self["tokens"][places] = drawn.token_ids_N
        self["logprobs"][places] = drawn.logprobs_N
        self["num_tokens"][slots_R] += drawn.is_finite_N
        is_full_R = self["num_tokens"][slots_R] == self["most_tokens"][slots_R]
        is_stop_R = self["stops"][slots_R, drawn.token_ids_N]
        is_done_R: np.ndarray = is_full_R | is_stop_R | ~drawn.is_finite_N
        return is_done_R
