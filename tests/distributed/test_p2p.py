"""Slices cross from learner ranks to engine ranks: every byte in place, or an error with names."""

import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from r1mega.config.schema import Model
from r1mega.parallel.collectives import Team
from r1mega.parallel.layout import Layout
from r1mega.rollout import control
from r1mega.rollout.fleet import Fleet
from r1mega.rollout.p2p.carrier import PointToPoint
from r1mega.rollout.p2p.invite import invite_embedded
from r1mega.rollout.p2p.messages import Turns
from r1mega.rollout.p2p.outbox import Outbox
from r1mega.rollout.p2p.receiver import (
    REPORT_BYTES,
    Invitation,
    ReceiveFailed,
    leave,
    read_report,
    receive,
)
from r1mega.rollout.p2p.sender import Outgoing, queue, send_all
from r1mega.rollout.p2p.wire import PeerLost, Posted, Wire, as_bytes
from r1mega.rollout.proof import Proof
from r1mega.rollout.router import RouterClient
from r1mega.rollout.wire import join_group
from r1mega.system.processes import free_port
from r1mega.weights.engine_names import EngineLayout
from r1mega.weights.reshard import Plan, plan
from tests.distributed.fleets import running_fleet, wait_until, weights
from tests.distributed.launch import run_ranks
from tests.distributed.publishing import Source, checksums, local_weights, publisher
from tests.distributed.shards import cut, engine_shard, learner_shard
from tests.distributed.tiny import MODEL, MODELS

LEARNERS = 2
FOUR, TWO = EngineLayout(tp=4, ep=2), EngineLayout(tp=2, dp=2)  # ranks 2 to 5, 6 and 7
WORLD = LEARNERS + FOUR.tp + TWO.tp
BLOCKS = replace(  # can be cut in blocks of 128
    MODEL,
    hidden_size=128,
    num_hidden_layers=2,
    intermediate_size=512,
    moe_intermediate_size=512,
    n_routed_experts=4,
    q_lora_rank=128,
    kv_lora_rank=112,  # and the last block of kv_a_proj_with_mqa is a smaller one
    qk_nope_head_dim=128,
    qk_rope_head_dim=128,
    v_head_dim=128,
)


@dataclass(frozen=True, kw_only=True)
class Case:
    model: Model = MODEL
    axes: dict[str, int] = field(default_factory=lambda: {"tp": 2})
    engines: tuple[EngineLayout, EngineLayout] = (FOUR, TWO)
    dtype: torch.dtype = torch.float32

    @property
    def plan(self) -> Plan:
        layout = Layout(world=LEARNERS, **self.axes)
        return plan(self.model, layout, self.engines, itemsize=self.dtype.itemsize)


CASES = {
    "tp": Case(),
    "pp, bf16": Case(axes={"pp": 2}, dtype=torch.bfloat16),
    "dp": Case(axes={}),
    "ep, no query lora": Case(model=MODELS["deepseek_v3 without query lora"], axes={"ep": 2}),
    "fewer key-value heads than ranks, tied": Case(
        model=MODELS["qwen2 tied"], engines=(EngineLayout(tp=4), EngineLayout(tp=2))
    ),
    "llama": Case(model=MODELS["llama"], engines=(EngineLayout(tp=4), EngineLayout(tp=2))),
    "fp8": Case(
        model=BLOCKS, engines=(replace(FOUR, quantized=True), replace(TWO, quantized=True))
    ),
}


def name_of(rank: int) -> str:
    engine, rank = divmod(rank - LEARNERS, FOUR.tp)
    return f"engine-{engine} rank {rank}"


class Flipping(Wire):
    """Flips a bit of all that goes to one rank on its way."""

    __slots__ = ()

    def send(self, data: Tensor, peer: int, what: str) -> Posted:
        if peer == 3 and what.endswith("down_proj.weight"):
            data = data.clone()
            data[-1] ^= 1
        return Wire.send(self, data, peer, what)


def misplaced(items: list[Outgoing]) -> list[Outgoing]:
    """The first one lies beyond its tensor."""
    first = items[0]
    (start, stop), *rest = first.piece.region
    beyond = replace(first.piece, region=((start + 10_000, stop + 10_000), *rest))
    return [replace(first, piece=beyond), *items[1:]]


def join(rank: int, port: int, name: str, timeout_s: float) -> dist.ProcessGroup:
    group = join_group(
        address="127.0.0.1",
        port=port,
        rank=rank,
        world_size=WORLD,
        name=name,
        backend="gloo",
        join_timeout_s=60,
        timeout_s=timeout_s,
    )
    dist.barrier(group)
    return group


def send_part(
    wire: Wire,
    rank: int,
    case: Case,
    seed: int,
    tamper: Callable[[list[Outgoing]], list[Outgoing]] = list,
) -> Any:
    """What rank 0 is told of each receiver, and the bytes sent."""
    layout = case.plan.learner
    outbox = Outbox(learner_shard(case.model, layout, rank, seed=seed, dtype=case.dtype))
    items: dict[int, list[Outgoing]] = {}
    for transfer in case.plan.sends(rank):
        to = LEARNERS + transfer.engine * FOUR.tp + transfer.rank
        items.setdefault(to, []).append(outbox.item(transfer))
    if 3 in items:
        items[3] = tamper(items[3])
    queues = {to: queue(mine, 5_000) for to, mine in items.items()}
    try:
        sent = send_all(wire, queues, outbox.read, rank=rank, turns=Turns(LEARNERS, WORLD))
        if rank:
            return sent
        reports = {to: torch.empty(REPORT_BYTES, dtype=torch.uint8) for to in range(2, WORLD)}
        for to, report in reports.items():
            wire.receive(report, to, "the report").wait()
        faults = {to: fault for to, report in reports.items() if (fault := read_report(report))}
        return faults or sent
    except PeerLost as lost:
        return str(lost)


def receive_part(invitation: Invitation, case: Case, seed: int) -> Any:
    """The tensors that are not as they should be, or what went wrong."""
    engine, rank = divmod(invitation.rank - LEARNERS, FOUR.tp)
    layout = case.engines[engine]
    shapes: dict[str, Any] = {"dtype": case.dtype}
    held = engine_shard(case.model, layout, rank, seed=None, **shapes)
    sources = {transfer.source for transfer in case.plan.receives(engine, rank)}
    try:
        receive(held, replace(invitation, senders=tuple(sources)))
    except ReceiveFailed as error:
        return str(error)
    expected = engine_shard(case.model, layout, rank, seed=seed, **shapes)
    assert held.keys() == expected.keys()
    return [
        name for name in held if not torch.equal(as_bytes(held[name]), as_bytes(expected[name]))
    ]


def take_part(ports: list[int]) -> dict[str, Any]:
    """All transfers of one rank, by name."""
    rank = int(os.environ["RANK"])
    found: dict[str, Any] = {}

    def meet(name: str, port: int, timeout_s: float) -> Callable[..., Any]:
        if rank < LEARNERS:
            group = join(rank, port, name, timeout_s)
            return lambda case, seed, wire=Wire, tamper=list: send_part(
                wire(group, torch.device("cpu"), name_of), rank, case, seed, tamper
            )
        invitation = Invitation(
            address="127.0.0.1",
            port=port,
            group=name,
            backend="gloo",
            world=WORLD,
            learners=LEARNERS,
            receiver=name_of(rank),
            rank=rank,
            senders=(),
            join_timeout_s=60.0,
            timeout_s=timeout_s,
        )
        return lambda case, seed, **_: receive_part(invitation, case, seed)

    transfer = meet("r1mega-p2p-0", ports[0], 60.0)
    for seed, (name, case) in enumerate(CASES.items()):
        found[name] = transfer(case, seed)
    found["flipped"] = transfer(CASES["tp"], 20, wire=Flipping)
    found["misplaced"] = transfer(CASES["tp"], 21, tamper=misplaced)
    found["afterwards"] = transfer(CASES["tp"], 22)
    if rank == 3:
        leave("r1mega-p2p-0")
    else:
        found["lost"] = transfer(CASES["tp"], 23)
        if rank < LEARNERS:
            leave("r1mega-p2p-0")
    del transfer  # and with it the last reference to the group
    if rank == 3:
        group = join(rank, ports[1], "r1mega-p2p-1", 60.0)
        time.sleep(12)  # longer than the others' timeout
        del group
    else:
        found["silent"] = meet("r1mega-p2p-1", ports[1], 8.0)(CASES["tp"], 24)
    return found


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run_ranks(__name__, "take_part", world=WORLD, ports=[free_port(), free_port()])


@pytest.mark.parametrize("name", [*CASES, "afterwards"])
def test_every_engine_byte_is_the_learners(results: list[dict[str, Any]], name: str) -> None:
    sent = [result[name] for result in results[:LEARNERS]]
    assert [result[name] for result in results[LEARNERS:]] == [[]] * (WORLD - LEARNERS)
    routes = CASES.get(name, CASES["tp"]).plan
    assert sent == list(routes.sent_bytes)
    assert sum(sent) == routes.minimum_bytes


def test_a_flipped_bit_names_tensor_sender_and_receiver(results: list[dict[str, Any]]) -> None:
    found = [result["flipped"] for result in results]
    assert found[0] == {"3": found[3]}  # rank 0 is told, of no other receiver
    assert re.fullmatch(
        r"engine-0 rank 1: model\S+down_proj\.weight .* is not what learner rank 0 sent", found[3]
    )
    assert [found[rank] for rank in range(LEARNERS, WORLD) if rank != 3] == [[]] * 5


def test_what_does_not_fit_is_said_and_nobody_waits(results: list[dict[str, Any]]) -> None:
    found = [result["misplaced"] for result in results]
    assert found[0] == {"3": found[3]}
    assert re.match(
        r"engine-0 rank 1: learner rank 0 sends what does not fit: model\S+ has shape \[", found[3]
    )


@pytest.mark.parametrize("how", ["lost", "silent"])
def test_everybody_ends_when_one_is_gone(results: list[dict[str, Any]], how: str) -> None:
    found = {rank: result[how] for rank, result in enumerate(results) if rank != 3}
    assert "did not get to engine-0 rank 1: " in found[0]
    for rank in range(LEARNERS, WORLD):
        if rank != 3:
            expected = rf"{name_of(rank)}: .+ did not come from learner rank \d: "
            assert re.match(expected, found[rank]), found[rank]


def publish_on_rank(folder: str, router_url: str, victim: int, url: str) -> list[Any]:
    """One learner rank of two; an engine dies while the second version is on its way."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=90))
    team = Team(dist.group.WORLD)
    root, source, rank = Path(folder), Source(seed=1), dist.get_rank()
    held = local_weights(source, Layout(world=2, tp=2), rank)
    carrier = PointToPoint(
        held, EngineLayout(fused=False), invite_embedded, team=team, bucket_bytes=5_000
    )
    fleet = None
    if team.is_root:
        fleet = Fleet(root / "fleet", RouterClient(router_url), logs=root / "logs")
    proof = Proof(checksums=checksums(source, "all")) if team.is_root else Proof()
    published = publisher(fleet, carrier, proof, team=team)
    first = published.publish(1)
    source.seed = 2
    tensors = source.tensors
    held.fill(lambda name, shape, region: cut(tensors[name], region))
    reads = 0

    def read(item: Outgoing) -> Tensor:
        nonlocal reads
        reads += 1
        if rank == 1 and reads == 20:
            os.kill(victim, signal.SIGKILL)  # its keeper: the engine follows in a moment
            wait_until(lambda: not control.answers(f"{url}/health", timeout_s=30))
        return type(carrier._outbox).read(carrier._outbox, item)

    carrier._outbox.read = read  # type: ignore[method-assign]
    second = published.publish(2)
    published.close()
    return [
        [r.engines, r.bytes, r.minimum_bytes, r.point_to_point_bytes, r.verified]
        for r in (first, second)
    ]


def test_an_engine_killed_on_the_way_is_left_out(tmp_path: Path) -> None:
    with running_fleet(tmp_path, 2) as fleet:
        zero, one = fleet.client().wait_ready(2, 60)
        results = run_ranks(
            __name__,
            "publish_on_rank",
            world=2,
            folder=str(fleet.folder),
            router_url=fleet.router_url,
            victim=one.pid,
            url=one.url,
        )
        assert control.get(f"{zero.url}/model_info", timeout_s=30)["weight_version"] == "2"
    tensors = weights(1)
    size, count = sum(tensor.nbytes for tensor in tensors.values()), len(tensors)
    twice = [["engine-0", "engine-1"], 2 * size, 2 * size, 2 * size, 2 * count]
    assert results == [[twice, [["engine-0"], size, size, size, count]]] * 2
