"""Who holds what: the regions that partition each Hugging Face tensor, and the ranks of each.

Computed per axis of the layout, not per rank. Tensors that are cut and placed alike share one
``Held`` object, so that a plan over tens of thousands of experts can work on a few hundred kinds.
Pure Python: imports no torch.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import lcm

from r1mega.config import schema
from r1mega.parallel.layout import Layout
from r1mega.weights.blocks import own_scale_region, scale_name, scale_shape
from r1mega.weights.names import Row, Scope, Site, Spec, cut_row, rows_by_scope, sites, tensor_sizes
from r1mega.weights.regions import Region, is_empty

Part = tuple[Region, tuple[int, ...]]  # a region, and the ranks that hold it in rising order


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor of ``shape``: ``parts`` are disjoint and together all of it."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]


def holders(
    model: schema.Model,
    layout: Layout,
    spec: Spec = Spec(),
    *,
    quantized: Collection[str] = (),
) -> dict[str, Held]:
    """Every Hugging Face tensor, in forward order.

    After each weight in ``quantized`` come its FP8 scales, cut with it: a scale belongs to the rank
    that holds the first weight of its block.
    """
    everywhere = list(sites(model, layout, spec))
    rows, sizes = rows_by_scope(model, spec), tensor_sizes(model)
    copies = {row.hf: site for site in everywhere for row in rows["copy"] if site.scope == "copy"}
    same: dict[Held, Held] = {}
    alike: dict[tuple[Scope, int, int | None], list[tuple[Row, Held, Held | None]]] = {}
    table: dict[str, Held] = {}
    for site in everywhere:
        key = site.scope, site.stage, site.ep
        if key not in alike:
            alike[key] = []
            for row in rows[site.scope]:
                places = [site, copies[row.hf]] if row.hf in copies else [site]
                held = _held(row, places, sizes, layout)
                held = same.setdefault(held, held)
                alike[key].append((row, held, _scales(held) if row.fp8 else None))
        for row, held, scales in alike[key]:
            name = site.hf + row.hf
            table.setdefault(name, held)  # the site of a copy comes after that of the first
            if scales is not None and name in quantized:
                table[scale_name(name)] = scales
    return table


def balanced_owners(
    holders: Mapping[str, Held], num_bytes: Callable[[str, Region], int]
) -> dict[str, tuple[int, ...]]:
    """One of the ranks that hold it for every part of every tensor: the one to store or send it.

    Even in bytes: what has fewest holders is given out first, large before small, each to the rank
    with the least so far.
    """
    parts = [
        (len(ranks), -num_bytes(name, region), name, index, ranks)
        for name, held in holders.items()
        for index, (region, ranks) in enumerate(held.parts)
    ]
    owners = {name: [0] * len(held.parts) for name, held in holders.items()}
    load: dict[int, int] = {}
    for _, less, name, index, ranks in sorted(parts):
        owner = min(ranks, key=lambda rank: load.get(rank, 0))
        load[owner] = load.get(owner, 0) - less
        owners[name][index] = owner
    return {name: tuple(ranks) for name, ranks in owners.items()}


def ranks_for(*, tp: int = 1, pp: int = 1, ep: int = 1, etp: int = 1) -> int:
    """The smallest world with these axes: no replicas that could be spared."""
    return pp * lcm(tp, ep * etp)


def _held(row: Row, places: Sequence[Site], sizes: dict[str, int], layout: Layout) -> Held:
    parts: dict[Region, set[int]] = {}
    num_parts = layout.size(row.axis) if row.cut is not None else 1
    for index in range(num_parts):
        cut = cut_row(row, sizes, index, num_parts)
        if cut is None:
            continue
        along = {row.axis: index} if row.cut is not None else {}
        ranks = parts.setdefault(cut.region, set())
        for site in places:
            expert = {} if site.ep is None else {"ep": site.ep}
            ranks.update(layout.ranks_at(pp=site.stage, **along, **expert))
    shape = tuple(sizes[name] for name in row.shape.split())
    return Held(shape, tuple((region, tuple(sorted(ranks))) for region, ranks in parts.items()))


def _scales(held: Held) -> Held:
    parts = ((own_scale_region(region), ranks) for region, ranks in held.parts)
    filled = tuple((region, ranks) for region, ranks in parts if not is_empty(region))
    return Held(scale_shape(held.shape), filled)
