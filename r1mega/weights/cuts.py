"""How one dimension of a tensor is cut over ranks, and stacked in Megatron's; imports no torch."""

from dataclasses import dataclass

from r1mega.weights.regions import Region


@dataclass(frozen=True, slots=True)
class Stacked:
    """One of several Hugging Face tensors that Megatron stacks along dim 0 of one tensor.

    ``rows`` are the sizes of all of them in order, this one at ``index``. The stack repeats:
    ``groups`` names how often in the whole tensor; without it, once on every rank.
    """

    index: int
    rows: tuple[str, ...]
    groups: str | None = None


@dataclass(frozen=True, slots=True)
class Cut:
    """``region`` of a Hugging Face tensor of ``shape``: dim 0 of the Megatron tensor it lies in is
    ``blocks`` equal blocks, and the region, cut into as many, lies at ``target`` in each."""

    shape: tuple[int, ...]
    region: Region
    blocks: int
    target: Region


def stack(*rows: str, groups: str | None = None) -> tuple[Stacked, ...]:
    return tuple(Stacked(index, rows, groups) for index in range(len(rows)))


def cut_dim(
    stacked: Stacked, sizes: dict[str, int], index: int, parts: int
) -> tuple[tuple[int, int], tuple[int, int], int] | None:
    """The ``index``-th of ``parts``: range of the Hugging Face tensor, target, blocks.

    Megatron's whole dimension repeats the stack ``groups`` times and is cut evenly: into whole
    stacks or, when there are fewer of them than parts (key-value heads), into parts of one.
    """
    groups = parts if stacked.groups is None else sizes[stacked.groups]
    rows = [sizes[name] // groups for name in stacked.rows]
    before, size = sum(rows[: stacked.index]), rows[stacked.index]
    blocks, sharers = max(1, groups // parts), max(1, parts // groups)
    window = sum(rows) // sharers
    offset = index % sharers * window
    start, stop = max(before, offset), min(before + size, offset + window)
    if start >= stop:
        return None
    first, last = index * groups // parts * size, (index * groups // parts + blocks - 1) * size
    region = (first + start - before, last + stop - before)
    return region, (start - offset, stop - offset), blocks
