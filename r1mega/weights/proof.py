"""Proof of a reshard plan: every byte of every engine rank is written exactly once, by a rank that
has it.

What a rank holds is asked of the tables rank by rank, not taken from what the plan was made of, and
coverage is shown by disjointness and volume, not by intersection. Takes a few seconds at 671B.
"""

from collections import Counter
from collections.abc import Mapping
from itertools import chain, pairwise

from r1mega.weights.blocks import BLOCK, weight_name
from r1mega.weights.engine_names import CODES, FLOAT32, EngineSlice, EngineTensor, engine_slices
from r1mega.weights.names import parameter_slices
from r1mega.weights.regions import Region, extent, partition_fault, volume, within
from r1mega.weights.reshard import Flow, Plan

# What some rank of an engine gets: regions of each of some tensors, and their dtype.
_Written = dict[tuple[tuple[str, ...], str | None], list[Region]]


def prove(plan: Plan) -> None:
    """Raises ValueError that names the tensor, the ranks and what is wrong."""
    for flow in plan.flows:
        _prove_numbers(flow, plan.itemsize)
    _prove_sources(plan)
    written = _written(plan)
    for layout, tensors in plan.tensors.items():
        first, *others = (i for i, engine in enumerate(plan.engines) if engine == layout)
        for rank in range(layout.tp):
            expected = {piece.hf_name: piece for piece in engine_slices(plan.model, layout, rank)}
            where = f"rank {rank} of engine {first}"
            _prove_received(written[first, rank], expected, where)
            _prove_places(tensors, expected, where)
            for other in others:
                if written[other, rank] != written[first, rank]:
                    raise ValueError(
                        f"rank {rank} of engines {first} and {other}, which are laid out alike, "
                        "would not get the same"
                    )
    planned = sum(len(f.names) * len(r.targets) * r.num_bytes for f in plan.flows for r in f.routes)
    if not planned == plan.bytes == plan.minimum_bytes:
        raise ValueError(
            f"{planned} bytes are planned, {plan.bytes} shared out, for engines that hold "
            f"{plan.minimum_bytes}"
        )


def _prove_numbers(flow: Flow, itemsize: int) -> None:
    """Every item is sent, by one rank, and counted as what it is."""
    items = len(flow.names) * sum(len(route.targets) for route in flow.routes)
    rising = all(start <= stop for start, stop in pairwise(flow.bounds))
    if not rising or (flow.bounds[0], flow.bounds[-1]) != (0, items):
        raise ValueError(
            f"{flow.names[0]}: ranks {list(flow.sources)} share {items} pieces at "
            f"{list(flow.bounds)}: not each of them once"
        )
    widths: dict[str | None, int] = {CODES: 1, FLOAT32: 4, None: itemsize}
    if any(route.num_bytes != volume(route.region) * widths[flow.dtype] for route in flow.routes):
        raise ValueError(f"{flow.names[0]}: the bytes of its pieces are counted wrongly")


def _prove_sources(plan: Plan) -> None:
    """Every sender holds what it sends, and of scales the whole blocks."""
    by_source: dict[int, list[Flow]] = {}
    for flow in plan.flows:
        for source in flow.sources:
            by_source.setdefault(source, []).append(flow)
    for source, flows in by_source.items():
        slices = parameter_slices(plan.model, plan.learner, source, plan.spec)
        held = {piece.hf_name: (piece.hf_shape, piece.region) for piece in slices}
        for flow in flows:
            weights = (weight_name(name) or name for name in flow.names)
            for has in {held.get(name) for name in weights}:
                if has is None or not all(_has(*has, r.region, flow) for r in flow.routes):
                    raise ValueError(
                        f"rank {source} is to send of {flow.names[0]} or one like it what it "
                        f"has not: it holds {has and list(has[1])}"
                    )


def _has(shape: tuple[int, ...], held: Region, region: Region, flow: Flow) -> bool:
    block = 1 if weight_name(flow.names[0]) is None else BLOCK
    return all(
        start <= first * block and min(last * block, size) <= stop
        for (start, stop), (first, last), size in zip(held, region, shape, strict=True)
    )


def _written(plan: Plan) -> dict[tuple[int, int], _Written]:
    """By engine and rank."""
    written: dict[tuple[int, int], _Written] = {
        (number, rank): {} for number, e in enumerate(plan.engines) for rank in range(e.tp)
    }
    for flow in plan.flows:
        key = flow.names, flow.dtype
        for route in flow.routes:
            for target in route.targets:
                written[target].setdefault(key, []).append(route.region)
    return written


def _prove_received(written: _Written, expected: Mapping[str, EngineSlice], where: str) -> None:
    """All that the rank holds, without gap or overlap, and nothing else."""
    times = Counter(chain.from_iterable(names for names, _ in written))
    if wrong := [n for n in expected.keys() | times.keys() if (n in expected) != times[n]]:
        raise ValueError(f"{where}: {min(wrong)} is sent never, twice or for nothing")
    for (names, dtype), regions in written.items():
        for region, wanted in {(expected[n].region, expected[n].dtype) for n in names}:
            moved = [within(part, region) for part in regions]
            if fault := partition_fault(tuple(extent(region)), moved):
                raise ValueError(f"{where}: {names[0]}{list(region)}: {fault}")
            if dtype != wanted:
                raise ValueError(f"{where}: {names[0]} is sent as {dtype}, but is {wanted} there")


def _prove_places(
    tensors: Mapping[str, EngineTensor], expected: Mapping[str, EngineSlice], where: str
) -> None:
    """Everything lands where the rank has it."""
    kinds = {}
    for name, piece in expected.items():
        tensor = tensors[name]
        kinds[id(tensor), piece.region, piece.target] = tensor, piece
        if (parameter := tensor.parameter_of(name)) != piece.parameter:
            raise ValueError(f"{where}: {name} would land in {parameter}, not {piece.parameter}")
    for tensor, piece in kinds.values():
        if (target := tensor.target(piece.region, piece.region)) != piece.target:
            raise ValueError(
                f"{where}: {piece.hf_name} would land at {list(target)} of {piece.parameter}, not "
                f"{list(piece.target)}"
            )
