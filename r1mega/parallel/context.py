"""How packed sequences are cut over context-parallel ranks, and what these ranks exchange.

Every sequence, padded to a multiple of 2 * cp tokens, is cut into 2 * cp equal chunks, and rank r
holds chunks r and 2 * cp - 1 - r: the early half of a causal mask is cheap and the late half dear,
so all ranks pay the same. TransformerEngine expects packed (THD) tokens cut just so.
Shapes: T packed tokens of all context-parallel ranks together, R target rows.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def padded_lengths(lengths: list[int], *, cp: int, multiple: int, least: int = 0) -> list[int]:
    """Blocks of the packed batch: every sequence padded for its cut, then blocks of padding alone.

    The sum is a multiple of ``cp * multiple`` (each rank's part one of ``multiple``) and at least
    ``least``. Padding is cut as the sequences are, in blocks no longer than the longest of them.
    """
    cut = 2 * cp if cp > 1 else 1
    blocks = [-(-length // cut) * cut for length in lengths]
    whole = math.lcm(cp * multiple, cut)
    padding = -(-max(sum(blocks), least, 1) // whole) * whole - sum(blocks)
    longest = max(blocks, default=whole)
    full, rest = divmod(padding, longest)
    return [*blocks, *[longest] * full, *[rest] * bool(rest)]


def zigzag_rows(starts: Tensor, cp: int, rank: int) -> Tensor:
    """Which of the T packed tokens ``rank`` holds, in the order it holds them: [T / cp].

    ``starts`` [sequences + 1] are the cumulative padded lengths (cu_seqlens).
    """
    starts = starts.long()
    if cp == 1:
        return torch.arange(int(starts[-1]), device=starts.device)
    chunks = starts.diff() // (2 * cp)
    firsts = torch.stack([starts[:-1] + rank * chunks, starts[1:] - (rank + 1) * chunks], dim=1)
    return _ranges(firsts.flatten(), chunks.repeat_interleave(2))


def _ranges(firsts: Tensor, lengths: Tensor) -> Tensor:
    """``_ranges([3, 8], [2, 1]) == [3, 4, 8]``"""
    shifts = firsts - (lengths.cumsum(0) - lengths)
    return torch.arange(int(lengths.sum()), device=firsts.device) + shifts.repeat_interleave(
        lengths
    )


def gather_rows(values_NL: Tensor, places_L: Tensor, num_rows: int, group: ProcessGroup) -> Tensor:
    """Every rank's columns at their places among all ``num_rows``, on every rank: [N, R].

    Backward takes each rank's own columns: all ranks of ``group`` then compute the same loss, and
    only the tokens that a rank holds carry its gradient.
    """
    if group.size() == 1:
        return values_NL
    gathered: Tensor = _GatherRows.apply(values_NL, places_L, num_rows, group)
    return gathered


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values_NL, places_L, num_rows, group):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(places_L)
        table_NR = values_NL.new_zeros(len(values_NL), num_rows)
        table_NR[:, places_L] = values_NL
        # Every place is filled by exactly one rank: adding zeros is exact.
        dist.all_reduce(table_NR, group=group)
        return table_NR

    @staticmethod
    def backward(ctx, grad_NR):  # type: ignore[no-untyped-def]
        (places_L,) = ctx.saved_tensors
        return grad_NR[:, places_L], None, None, None
