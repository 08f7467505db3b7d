"""Latent KV cache: per layer, slot and position the normed kv latent and the rotated key.

A running request owns one slot. Latents of finished prompts are kept beside the slots, so that
further samples of the same prompt start from a copy; least recently used prompts go first.
"""

from collections import OrderedDict

import torch
from torch import Tensor

Prompt = tuple[int, ...]


class LatentCache:
    """Slots plus the latents of prompts that were computed before."""

    def __init__(
        self, *, num_layers: int, num_slots: int, num_positions: int, width: int, prefix_bytes: int
    ) -> None:
        self.latents = torch.zeros(num_layers, num_slots, num_positions, width)  # (layer, S, L, C)
        self._free = list(range(num_slots - 1, -1, -1))
        self._prefixes: OrderedDict[Prompt, Tensor] = OrderedDict()
        self._prefix_bytes_left = prefix_bytes

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take_slot(self) -> int:
        return self._free.pop()

    def release_slot(self, slot: int, *, poisoned: bool = False) -> None:
        """``poisoned``: the slot holds values that are not finite, which no mask would hide."""
        if poisoned:
            self.latents[:, slot].zero_()
        self._free.append(slot)

    def keep_prefix(self, prompt: Prompt, slot: int) -> None:
        if prompt in self._prefixes:
            return
        latents = self.latents[:, slot, : len(prompt)].clone()
        self._prefixes[prompt] = latents
        self._prefix_bytes_left -= latents.nbytes
        while self._prefix_bytes_left < 0:
            _, oldest = self._prefixes.popitem(last=False)
            self._prefix_bytes_left += oldest.nbytes

    def copy_prefix(self, prompt: Prompt, slot: int) -> int:
        """How many positions of the slot are now computed.

        The last prompt token is always left to compute: its logits choose the first token.
        """
        latents = self._prefixes.get(prompt)
        if latents is None:
            return 0
        self._prefixes.move_to_end(prompt)
        num_cached = len(prompt) - 1
        self.latents[:, slot, :num_cached] = latents[:, :num_cached]
        return num_cached

    def flush(self) -> None:
        """Forget all prompts."""
        self._prefix_bytes_left += sum(latents.nbytes for latents in self._prefixes.values())
        self._prefixes.clear()
