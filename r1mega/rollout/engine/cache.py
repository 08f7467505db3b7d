"""What is kept of computed tokens: their rows in every layer, and the experts they went to.

A running request owns one slot. What finished prompts left is kept beside the slots, so that
further samples of the same prompt start from a copy; least recently used prompts go first.

Legend: S slots, P positions, K key/value heads, W width of a row (see attention.py).
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

from r1mega.config.schema import Model
from r1mega.rollout.engine.attention import cache_shape
from r1mega.rollout.engine.plan import BUCKET, Step, padded

Prompt = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Prefix:
    """Copies of what the first positions of a slot held."""

    rows: Tensor
    experts: Tensor

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + self.experts.nbytes


class Cache:
    """Slots, and prompts that were computed before."""

    def __init__(
        self,
        model: Model,
        *,
        num_slots: int,
        num_positions: int,
        prefix_bytes: int,
        records_experts: bool = False,
    ) -> None:
        num_layers, num_positions = model.num_hidden_layers, padded(num_positions, BUCKET)
        heads, width = cache_shape(model)
        self.layers = torch.zeros(num_layers, num_slots, heads, num_positions, width)
        # (S, P, layer, expert) as answers give it, zero in dense layers; of no width if unrecorded
        width = model.num_experts_per_tok if records_experts else 0
        self._experts = torch.zeros(num_slots, num_positions, num_layers, width, dtype=torch.int32)
        self._prefixes: OrderedDict[Prompt, _Prefix] = OrderedDict()
        self._prefix_bytes_left = prefix_bytes

    @property
    def num_slots(self) -> int:
        return self.layers.shape[1]

    @property
    def num_positions(self) -> int:
        return self.layers.shape[3]

    @property
    def records_experts(self) -> bool:
        return self._experts.shape[-1] > 0

    def record_experts(self, layer: int, step: Step, experts_NK: Tensor) -> None:
        if self.records_experts:
            n = step.num_tokens
            places = (step.slots_N[:n], step.positions_N[:n], torch.tensor(layer))
            self._experts[places] = experts_NK[:n].to(torch.int32)

    def experts(self, slot: int, start: int, stop: int) -> bytes:
        """Of positions [start, stop): int32 (position, layer, expert), row-major."""
        return self._experts[slot, start:stop].numpy().tobytes()

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of one slot to another."""
        self.layers[:, target, :, :length] = self.layers[:, source, :, :length]
        self._experts[target, :length] = self._experts[source, :length]

    def clear(self, slot: int) -> None:
        """Needed when a slot holds values that are not finite, which no mask would hide."""
        self.layers[:, slot].zero_()

    def keep_prefix(self, prompt: Prompt, slot: int) -> None:
        if prompt in self._prefixes:
            return
        length = len(prompt)
        rows = self.layers[:, slot, :, :length].clone()
        self._prefixes[prompt] = prefix = _Prefix(rows, self._experts[slot, :length].clone())
        self._prefix_bytes_left -= prefix.nbytes
        while self._prefix_bytes_left < 0:
            _, oldest = self._prefixes.popitem(last=False)
            self._prefix_bytes_left += oldest.nbytes

    def copy_prefix(self, prompt: Prompt, slot: int) -> int:
        """How many positions of the slot are now computed.

        The last prompt token is always left to compute: its logits choose the first token.
        """
        prefix = self._prefixes.get(prompt)
        if prefix is None:
            return 0
        self._prefixes.move_to_end(prompt)
        length = len(prompt) - 1
        self.layers[:, slot, :, :length] = prefix.rows[:, :, :length]
        self._experts[slot, :length] = prefix.experts[:length]
        return length

    def flush(self) -> None:
        """Forget all prompts."""
        self._prefix_bytes_left += sum(prefix.nbytes for prefix in self._prefixes.values())
        self._prefixes.clear()
