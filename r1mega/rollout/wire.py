"""What trainer and engine do alike in a weight update: they join a group."""

from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d


def join_group(
    *,
    address: str,
    port: int,
    rank: int,
    world_size: int,
    name: str,
    backend: str,
    join_timeout_s: float,
    timeout_s: float,
) -> dist.ProcessGroup:
    """The trainer, rank 0, listens on address:port; the engines come; returns when all are there.

    The body of ``torch.distributed.init_process_group`` beside, or without, a default group:
    SGLang and every trainer that feeds it do the same, so the keys in the store agree.
    """
    # Not rendezvous(): under torch.distributed.run it would make us a client of the agent's store.
    store = dist.TCPStore(
        address,
        port,
        world_size,
        is_master=rank == 0,
        timeout=timedelta(seconds=join_timeout_s),
        wait_for_workers=False,
    )
    group, _ = c10d._new_process_group_helper(
        world_size,
        rank,
        [],
        c10d.Backend(backend),
        c10d.PrefixStore(name, store),
        group_name=c10d.GroupName(name),
        timeout=timedelta(seconds=timeout_s),
    )
    if not isinstance(group, dist.ProcessGroup):
        raise RuntimeError(f"rank {rank} is not part of group {name!r}")
    c10d._world.pg_group_ranks[group] = {i: i for i in range(world_size)}
    return group
