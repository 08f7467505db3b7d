"""Weights from a sharded learner to a sharded engine: point to point, beside what bounds it.

Four learner ranks (tp 2, ep 2, dp 2) send a DeepSeek-V3 in bf16 to the two ranks of an engine
(tp 2, ep 2, SGLang's fused names), each a process on this machine, over gloo:

- r1mega: the reshard plan through messages, digests of every slice on both sides included;
- plain: the same slices between the same processes, each lying contiguous in memory that nobody
  writes before or reads after: torch.distributed's isend and irecv, all at once;
- flat: the same with all slices of two processes in one message, which no tensors lie in;
- megatron: megatron.core.resharding (0.16.1) to the same layout under Megatron's names, with its
  GlooCopyService less the CUDA stream that it makes and does not use. It moves no expert bias.

All alternate in one run; a time is the slowest rank's, from a common start. One JSON line:
medians, GB/s of weights that arrived.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace

os.environ |= {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "PYTHONWARNINGS": "ignore"}

import torch
import torch.distributed as dist
from torch import nn

from r1mega.config.schema import Model
from r1mega.parallel.backend import open_backend
from r1mega.parallel.layout import Layout
from r1mega.rollout.p2p.messages import Turns
from r1mega.rollout.p2p.outbox import Outbox
from r1mega.rollout.p2p.receiver import REPORT_BYTES, Invitation, receive
from r1mega.rollout.p2p.sender import Outgoing, queue, send_all
from r1mega.rollout.p2p.wire import Wire
from r1mega.rollout.wire import join_group
from r1mega.system.processes import free_port
from r1mega.weights.engine_names import EngineLayout
from r1mega.weights.names import ParameterSlice, Spec, is_float32, parameter_slices
from r1mega.weights.regions import volume
from r1mega.weights.reshard import Plan, plan

MODEL = Model(
    vocab_size=16_384,
    hidden_size=1024,
    intermediate_size=4096,
    moe_intermediate_size=512,
    num_hidden_layers=6,
    num_attention_heads=16,
    q_lora_rank=384,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    n_routed_experts=8,
)
LEARNER = Layout(world=4, tp=2, ep=2)
ENGINE = EngineLayout(tp=2, ep=2)
PEER_ENGINE = Layout(world=2, tp=2, ep=2)
WORLD = LEARNER.world + ENGINE.tp
BUCKET_BYTES = 16 << 20
REPEATS = 9
Move = Callable[[], None]


def main() -> None:
    root = str(Path(__file__).parents[1])  # for the weights of tests
    env = {**os.environ, "PYTHONPATH": root, "MASTER_PORT": str(free_port())}
    port = str(free_port())
    argv = [[sys.executable, __file__, str(rank), port] for rank in range(WORLD)]
    ranks = [subprocess.Popen(one, env=env) for one in argv]
    sys.exit(max(process.wait() for process in ranks))


def run(rank: int, port: int) -> None:
    """``port``: for a group beside the default one."""
    open_backend("cpu")
    address = f"tcp://127.0.0.1:{os.environ['MASTER_PORT']}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=WORLD)
    routes = plan(MODEL, LEARNER, [ENGINE])
    moves = {
        "r1mega": ours(rank, port, routes),
        "plain": plain(rank, routes, flat=False),
        "flat": plain(rank, routes, flat=True),
        "megatron": megatron(rank),
    }
    seconds: dict[str, list[float]] = {name: [] for name in moves}
    for _ in range(REPEATS):
        for name, move in moves.items():
            dist.barrier()
            started = time.perf_counter()
            move()
            taken = torch.tensor(time.perf_counter() - started)
            dist.all_reduce(taken, dist.ReduceOp.MAX)
            seconds[name].append(taken.item())
    if rank == 0:
        times = {name: median(values[1:]) for name, values in seconds.items()}
        result: dict[str, object] = {"benchmark": "p2p", "megabytes": round(routes.bytes / 1e6, 1)}
        result |= {f"{name}_gb_s": round(routes.bytes / 1e9 / t, 3) for name, t in times.items()}
        for peer in ("plain", "flat", "megatron"):
            result[f"r1mega_over_{peer}"] = round(times[peer] / times["r1mega"], 3)
        print(json.dumps(result), flush=True)
    dist.barrier()
    os._exit(0)  # gloo's threads need not be joined


def ours(rank: int, port: int, routes: Plan) -> Move:
    from tests.distributed.shards import engine_shard, learner_shard

    name = "r1mega-p2p-benchmark"
    dtype = torch.bfloat16
    if rank >= LEARNER.world:
        to = rank - LEARNER.world
        tensors = engine_shard(MODEL, ENGINE, to, seed=None, dtype=dtype)
        invitation = Invitation(
            address="127.0.0.1",
            port=port,
            group=name,
            backend="gloo",
            world=WORLD,
            learners=LEARNER.world,
            receiver=f"engine rank {to}",
            rank=rank,
            senders=tuple({transfer.source for transfer in routes.receives(0, to)}),
            join_timeout_s=60.0,
            timeout_s=60.0,
        )
        return lambda: receive(tensors, invitation)
    outbox = Outbox(learner_shard(MODEL, LEARNER, rank, seed=1, dtype=dtype))
    items: dict[int, list[Outgoing]] = {}
    for transfer in routes.sends(rank):
        items.setdefault(LEARNER.world + transfer.rank, []).append(outbox.item(transfer))
    queues = {to: queue(mine, BUCKET_BYTES) for to, mine in items.items()}
    wires: list[Wire] = []

    def move() -> None:
        if not wires:  # as late as the receivers join
            group = join_group(
                address="127.0.0.1",
                port=port,
                rank=rank,
                world_size=WORLD,
                name=name,
                backend="gloo",
                join_timeout_s=60.0,
                timeout_s=60.0,
            )
            dist.barrier(group)
            wires.append(Wire(group, torch.device("cpu"), str))
        turns = Turns(LEARNER.world, WORLD)
        send_all(wires[0], queues, outbox.read, rank=rank, turns=turns)
        if rank == 0:
            for to in range(LEARNER.world, WORLD):
                wires[0].receive(torch.empty(REPORT_BYTES, dtype=torch.uint8), to, "").wait()

    return move


def plain(rank: int, routes: Plan, *, flat: bool) -> Move:
    """``flat``: one message for all slices of a pair; else one for each, as they come."""
    sizes: dict[tuple[int, int], list[int]] = {}  # (sender, receiver) -> bytes
    for sender in range(LEARNER.world):
        for transfer in routes.sends(sender):
            itemsize = 4 if is_float32(transfer.hf_name) else 2
            pair = sender, LEARNER.world + transfer.rank
            sizes.setdefault(pair, []).append(volume(transfer.region) * itemsize)
    mine = [
        (pair, torch.ones(nbytes, dtype=torch.uint8))
        for pair, every in sizes.items()
        if rank in pair
        for nbytes in ([sum(every)] if flat else every)
    ]

    def move() -> None:
        works = [
            dist.isend(data, to) if rank == sender else dist.irecv(data, sender)
            for (sender, to), data in mine
        ]
        for work in works:
            work.wait()

    return move


def megatron(rank: int) -> Move:
    """The same reshard by Megatron-Core, from modules that are nothing but their parameters."""
    from megatron.core.resharding.copy_services.gloo_copy_service import GlooCopyService
    from megatron.core.resharding.execution import execute_reshard_plan
    from megatron.core.resharding.planner import build_centralized_reshard_plan

    class Service(GlooCopyService):
        """Its constructor, less the CUDA stream."""

        def __init__(self) -> None:
            self.rank, self.world_size = rank, WORLD
            self.gloo_pg = dist.new_group(backend="gloo")
            self.send_ops, self.recv_ops = [], []
            self._copy_stream = None

    learner, engine = shards(LEARNER, rank, 0), shards(PEER_ENGINE, rank, LEARNER.world)
    transfers = build_centralized_reshard_plan(learner, engine, num_experts=MODEL.n_routed_experts)
    service = Service()
    return lambda: execute_reshard_plan(transfers, learner, engine, service)


def shards(layout: Layout, rank: int, first: int) -> nn.Module:
    """What this rank holds of ``layout``, whose ranks begin at ``first``, in Megatron's terms."""
    module = nn.Module()
    groups = {axis: group_of(layout, axis, rank, first) for axis in ("tp", "ep", "dp", "pp")}
    module.pg_collection = SimpleNamespace(**groups, expt_tp=None)
    if not first <= rank < first + layout.world:
        return module
    slices: dict[str, list[ParameterSlice]] = {}
    for held in parameter_slices(MODEL, layout, rank - first, Spec(grouped_experts=True)):
        slices.setdefault(held.megatron_name, []).append(held)
    for name, stacked in slices.items():
        *path, last = name.split(".")
        if last != "expert_bias":  # a buffer
            owner = module
            for step in path:
                owner = owner._modules.setdefault(step, nn.Module())
            setattr(owner, last, parameter(stacked, is_expert=".experts." in name))
    return module


def parameter(stacked: list[ParameterSlice], *, is_expert: bool) -> nn.Parameter:
    rows = max(held.target[0][1] for held in stacked)
    shape = [rows, *(stop for _, stop in stacked[0].target[1:])]
    values = nn.Parameter(torch.ones(shape, dtype=torch.bfloat16), requires_grad=False)
    whole_, region = stacked[0].hf_shape, stacked[0].region
    cut = [dim for dim, size in enumerate(whole_) if region[dim] != (0, size)]
    values.tensor_model_parallel = bool(cut)  # type: ignore[attr-defined]
    values.partition_dim = cut[0] if cut else 0  # type: ignore[attr-defined]
    values.partition_stride = len(stacked)  # type: ignore[attr-defined]
    values.allreduce = not is_expert  # type: ignore[attr-defined]
    return values


def group_of(layout: Layout, axis: str, rank: int, first: int) -> dist.ProcessGroup | None:
    """This rank's over ``axis``; all ranks make all of them."""
    found = None
    for ranks in layout.groups(axis):
        moved = [first + one for one in ranks]
        group = dist.new_group(moved)
        if rank in moved:
            found = group
    return found


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run(*map(int, sys.argv[1:]))
    main()
