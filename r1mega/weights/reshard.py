"""The reshard plan: which learner rank sends which rectangle of which tensor to which engine rank.

Every byte of every engine rank comes from the learner exactly once, cut where learner rectangles
meet; the ranks that hold the same rectangle share the sending evenly. Tensors that lie alike on
both sides are planned as one flow, so that tens of thousands of experts take a few hundred steps. A
flow's items are numbered by route, then target, then tensor, and each of its sources sends one
unbroken stretch of them. Pure arithmetic; imports no torch.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from r1mega.config import schema
from r1mega.parallel.layout import Layout
from r1mega.weights.blocks import BLOCK, scale_name, scale_region
from r1mega.weights.engine_names import CODES, FLOAT32, EngineLayout, EngineTensor, engine_tensors
from r1mega.weights.holders import Held, holders
from r1mega.weights.names import Spec
from r1mega.weights.regions import Region, intersect, volume
from r1mega.weights.sharing import Demand, Stretch, share

_WIDTHS: dict[str | None, int] = {CODES: 1, FLOAT32: 4}  # bytes of an element
_SHARE_PIECES = 50  # so many pieces of a rank's share balance it to a few percent
_SMALLEST_PIECE = 1 << 20  # bytes; below it there is nothing to gain


@dataclass(frozen=True, slots=True)
class Transfer:
    """``hf_name[region]`` goes from learner rank ``source`` to ``parameter[target]`` on rank
    ``rank`` of engine number ``engine``.

    ``dtype`` is torch's name of it, None for the engine's dtype. FP8 scales are tensors of their
    own, sent by the rank that sends the codes, after them. A target has one dimension more than the
    region where an engine stacks experts.
    """

    hf_name: str
    region: Region
    source: int
    engine: int
    rank: int
    parameter: str
    target: Region
    dtype: str | None


@dataclass(frozen=True, slots=True)
class Route:
    """``region`` of each tensor of a flow goes to ``targets`` (engine, rank), which hold
    ``within``; it has ``num_bytes``."""

    region: Region
    within: Region
    targets: tuple[tuple[int, int], ...]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Flow:
    """Items that any of ``sources`` could send; the i-th sends ``bounds[i]`` to ``bounds[i+1]``."""

    names: tuple[str, ...]
    dtype: str | None
    sources: tuple[int, ...]
    routes: tuple[Route, ...]
    bounds: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """``bytes`` are sent in all, and ``minimum_bytes`` are held by all engine ranks together."""

    model: schema.Model
    learner: Layout
    spec: Spec
    engines: tuple[EngineLayout, ...]
    itemsize: int
    tensors: Mapping[EngineLayout, Mapping[str, EngineTensor]]
    flows: tuple[Flow, ...]
    sent_bytes: tuple[int, ...]  # of each learner rank
    minimum_bytes: int

    @property
    def bytes(self) -> int:
        return sum(self.sent_bytes)

    def sends(self, rank: int) -> Iterator[Transfer]:
        """What learner rank ``rank`` sends, in the order of the plan."""
        for flow in self.flows:
            if rank not in flow.sources:
                continue
            turn = flow.sources.index(rank)
            start, stop = flow.bounds[turn : turn + 2]
            first = 0
            for route in flow.routes:
                for engine, to in route.targets:
                    last = first + len(flow.names)
                    for item in range(max(first, start), min(last, stop)):
                        yield self._transfer(flow, route, item - first, rank, (engine, to))
                    first = last

    def receives(self, engine: int, rank: int) -> Iterator[Transfer]:
        """What ``rank`` of an engine receives, in the order of the plan."""
        for flow in self.flows:
            first = 0
            for route in flow.routes:
                if (engine, rank) in route.targets:
                    begin = first + route.targets.index((engine, rank)) * len(flow.names)
                    for index in range(len(flow.names)):
                        source = flow.sources[bisect_right(flow.bounds, begin + index) - 1]
                        yield self._transfer(flow, route, index, source, (engine, rank))
                first += len(route.targets) * len(flow.names)

    def _transfer(
        self, flow: Flow, route: Route, index: int, source: int, to: tuple[int, int]
    ) -> Transfer:
        name = flow.names[index]
        tensor = self.tensors[self.engines[to[0]]][name]
        return Transfer(
            name,
            route.region,
            source,
            *to,
            tensor.parameter_of(name),
            tensor.target(route.region, route.within),
            flow.dtype,
        )


def plan(
    model: schema.Model,
    learner: Layout,
    engines: Sequence[EngineLayout],
    *,
    spec: Spec = Spec(),
    itemsize: int = 2,
) -> Plan:
    """From a learner to some engines; ``itemsize`` is of what is neither FP8 nor always fp32.

    Raises ValueError for an engine that SGLang could not build, and for FP8 engines when the
    learner cuts a weight within a block of 128.
    """
    held = holders(model, learner, spec)
    tensors = {layout: engine_tensors(model, layout) for layout in dict.fromkeys(engines)}
    minimum_bytes = sum(
        count * _bytes_of_all_ranks(tensors[layout], itemsize)
        for layout, count in Counter(engines).items()
    )
    largest = max(_SMALLEST_PIECE, minimum_bytes // (learner.world * _SHARE_PIECES))
    flows: list[Flow] = []
    for quantized in (False, True):
        receivers = [
            _Receiver(tuple(i for i, e in enumerate(engines) if e == layout), of)
            for layout, of in tensors.items()
            if layout.quantized is quantized
        ]
        flows += _flows(held, receivers, itemsize, largest)
    bounds, sent_bytes = share([_demand(flow) for flow in flows], learner.world)
    shared = [replace(flow, bounds=each) for flow, each in zip(flows, bounds, strict=True)]
    return Plan(
        model=model,
        learner=learner,
        spec=spec,
        engines=tuple(engines),
        itemsize=itemsize,
        tensors=tensors,
        flows=tuple(part for flow in shared for part in _with_scales(flow)),
        sent_bytes=tuple(sent_bytes),
        minimum_bytes=minimum_bytes,
    )


@dataclass(frozen=True, slots=True)
class _Receiver:
    """Engines of one layout: their numbers, and what each of them holds."""

    engines: tuple[int, ...]
    tensors: Mapping[str, EngineTensor]


def _flows(
    held: Mapping[str, Held], receivers: Sequence[_Receiver], itemsize: int, largest: int
) -> Iterator[Flow]:
    """What receivers of one precision get; nobody sends it yet. Where ranks share the sending,
    pieces have at most ``largest`` bytes."""
    alike: dict[tuple[int, ...], list[str]] = {}
    for name in receivers[0].tensors if receivers else ():
        if name in held:  # but scales, which go with their weights
            lies = (id(receiver.tensors[name].held) for receiver in receivers)
            alike.setdefault((id(held[name]), *lies), []).append(name)
    for names in map(tuple, alike.values()):
        dtype, shape = receivers[0].tensors[names[0]].dtype, held[names[0]].shape
        for region, sources in held[names[0]].parts:
            if dtype == CODES:
                _check_blocks(names[0], shape, region)
            width = _WIDTHS.get(dtype, itemsize)
            routes = _routes(names[0], region, receivers, width)
            if len(sources) > 1:
                routes = (piece for route in routes for piece in _pieces(route, largest))
            yield Flow(names, dtype, sources, tuple(routes))


def _routes(
    name: str, region: Region, receivers: Sequence[_Receiver], width: int
) -> Iterator[Route]:
    """To all that hold some of ``region``; an element has ``width`` bytes."""
    for receiver in receivers:
        for within, ranks in receiver.tensors[name].held.parts:
            if (shared := intersect(region, within)) is not None:
                targets = tuple((engine, rank) for engine in receiver.engines for rank in ranks)
                yield Route(shared, within, targets, volume(shared) * width)


def _pieces(route: Route, largest: int) -> Iterator[Route]:
    """Cut along the rows, at blocks of FP8 scales."""
    (start, stop), *columns = route.region
    row_bytes = route.num_bytes // (stop - start)
    step = max(1, largest // (row_bytes * BLOCK)) * BLOCK
    for first in range(start, stop, step):
        last = min(first + step, stop)
        region = (first, last), *columns
        yield replace(route, region=region, num_bytes=(last - first) * row_bytes)


def _demand(flow: Flow) -> Demand:
    """Codes and their scales are sent by one rank, and count together."""
    return Demand(
        flow.sources,
        tuple(
            Stretch(
                len(flow.names) * len(route.targets),
                route.num_bytes + (_scales(route).num_bytes if flow.dtype == CODES else 0),
            )
            for route in flow.routes
        ),
    )


def _with_scales(flow: Flow) -> Iterator[Flow]:
    yield flow
    if flow.dtype == CODES:
        names = tuple(map(scale_name, flow.names))
        routes = tuple(map(_scales, flow.routes))
        yield replace(flow, names=names, dtype=FLOAT32, routes=routes)


def _scales(codes: Route) -> Route:
    region, within = scale_region(codes.region), scale_region(codes.within)
    return Route(region, within, codes.targets, volume(region) * _WIDTHS[FLOAT32])


def _check_blocks(name: str, shape: tuple[int, ...], region: Region) -> None:
    for (start, stop), size in zip(region, shape, strict=True):
        if start % BLOCK or (stop % BLOCK and stop != size):
            raise ValueError(
                f"a learner rank holds {name}{list(region)} of {list(shape)}, but FP8 scales one "
                f"whole block of {BLOCK} x {BLOCK} weights: choose a tp and etp that cut at "
                f"multiples of {BLOCK}, or rollout.sync=broadcast, which works with every layout"
            )


def _bytes_of_all_ranks(tensors: Mapping[str, EngineTensor], itemsize: int) -> int:
    """What the ranks of an engine hold together."""
    kinds = {id(tensor): tensor for tensor in tensors.values()}
    return sum(
        count * volume(region) * len(ranks) * _WIDTHS.get(kinds[kind].dtype, itemsize)
        for kind, count in Counter(map(id, tensors.values())).items()
        for region, ranks in kinds[kind].held.parts
    )
