"""Where the tokens of a forward go: rows, cache places, and the shapes of their attention.

A token attends over its position rounded up to ``BUCKET`` keys, whatever its company. Rows that
share that length and whose slots follow each other (or are one slot) read the cache in place;
where too many such runs would cost more than copying keys, the rows of one length are gathered.

Legend: R chunks (one per request of the step), N tokens, T tokens of one part, L keys.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

ROWS = 16  # of matrix products: see network.py
BUCKET = 32
_ROWS_PER_RUN = 8  # shorter runs, on average, are gathered instead


@dataclass(frozen=True, slots=True)
class Chunks:
    """Positions [start, start + count) of the requests in some slots; every count is positive."""

    slots_R: np.ndarray
    starts_R: np.ndarray
    counts_R: np.ndarray


@dataclass(frozen=True, slots=True)
class Part:
    """Rows that attend over ``length`` keys."""

    rows: slice | Tensor
    slots: slice | Tensor  # one for every row, or one for all
    length: int
    mask_T1L: Tensor  # 0 up to the token's own position, else -inf


@dataclass(frozen=True, slots=True)
class Step:
    """The tokens of a forward: token n is at position n of slot n, padding rows come last."""

    num_tokens: int
    token_ids_N: Tensor
    slots_N: Tensor
    positions_N: Tensor
    parts: tuple[Part, ...]


def padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def plan(tokens_SP: np.ndarray, chunks: Chunks) -> Step:
    """The step that computes these chunks of the token ids in every slot, in their order."""
    slots_R, starts_R, counts_R = chunks.slots_R, chunks.starts_R, chunks.counts_R
    ends_R = counts_R.cumsum()
    num_tokens = int(ends_R[-1])
    slots_N = np.zeros(padded(num_tokens, ROWS), dtype=np.int64)
    positions_N = np.zeros_like(slots_N)
    slots_N[:num_tokens] = slots_R.repeat(counts_R)
    positions_N[:num_tokens] = (starts_R - ends_R + counts_R).repeat(counts_R)
    positions_N[:num_tokens] += np.arange(num_tokens)
    parts: list[Part] = []
    for index in np.flatnonzero(counts_R > 1).tolist():
        start, count = int(starts_R[index]), int(counts_R[index])
        parts += _prompt_parts(int(ends_R[index]) - count, int(slots_R[index]), start, count)
    single_R = counts_R == 1
    if single_R.any():
        parts += _single_parts(ends_R[single_R] - 1, slots_R[single_R], starts_R[single_R])
    return Step(
        num_tokens=num_tokens,
        token_ids_N=torch.from_numpy(tokens_SP[slots_N, positions_N]),
        slots_N=torch.from_numpy(slots_N),
        positions_N=torch.from_numpy(positions_N),
        parts=tuple(parts),
    )


def _prompt_parts(row: int, slot: int, start: int, count: int) -> Iterator[Part]:
    """Several tokens of one request, cut where their bucket changes."""
    shift = row - start
    for length in range(padded(start + 1, BUCKET), padded(start + count, BUCKET) + 1, BUCKET):
        first, stop = max(start, length - BUCKET), min(start + count, length)
        mask_T1L = _mask(np.arange(first, stop), length)
        yield Part(slice(first + shift, stop + shift), slice(slot, slot + 1), length, mask_T1L)


def _single_parts(
    rows_T: np.ndarray, slots_T: np.ndarray, positions_T: np.ndarray
) -> Iterator[Part]:
    """One token each of several requests: runs of neighbours, or everything of one length."""
    lengths_T = (positions_T // BUCKET + 1) * BUCKET
    is_cut_T = (np.diff(lengths_T) != 0) | (np.diff(slots_T) != 1) | (np.diff(rows_T) != 1)
    cuts = (np.flatnonzero(is_cut_T) + 1).tolist()
    if len(cuts) * _ROWS_PER_RUN <= len(rows_T):
        for first, stop in pairwise([0, *cuts, len(rows_T)]):
            row, slot, length = int(rows_T[first]), int(slots_T[first]), int(lengths_T[first])
            yield Part(
                slice(row, row + stop - first),
                slice(slot, slot + stop - first),
                length,
                _mask(positions_T[first:stop], length),
            )
        return
    for length in np.unique(lengths_T).tolist():
        of_length = lengths_T == length
        rows, slots = torch.from_numpy(rows_T[of_length]), torch.from_numpy(slots_T[of_length])
        yield Part(rows, slots, length, _mask(positions_T[of_length], length))


def _mask(positions_T: np.ndarray, length: int) -> Tensor:
    is_ahead_T1L = np.arange(length) > positions_T[:, None, None]
    return torch.from_numpy(np.where(is_ahead_T1L, np.float32(-np.inf), np.float32(0.0)))
