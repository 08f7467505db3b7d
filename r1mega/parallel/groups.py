"""This rank's process groups: the only reader of megatron.core.parallel_state."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ProcessGroup

from r1mega.parallel.backend import Backend
from r1mega.parallel.layout import Layout


@dataclass(frozen=True, kw_only=True, slots=True)
class Groups:
    """The groups this rank belongs to, and where it stands in each."""

    layout: Layout
    rank: int
    tp: ProcessGroup
    pp: ProcessGroup
    cp: ProcessGroup
    dp: ProcessGroup
    world: ProcessGroup

    @property
    def place(self) -> dict[str, int]:
        return self.layout.coordinates(self.rank)

    @property
    def is_last_stage(self) -> bool:
        return self.place["pp"] == self.layout.pp - 1

    @property
    def reports_losses(self) -> bool:
        """One rank of each replica: on the last stage tp and cp ranks hold the same losses."""
        return self.is_last_stage and self.place["tp"] == self.place["cp"] == 0

    @property
    def is_dp_leader(self) -> bool:
        return self.rank == self.layout.dp_leader(self.place["dp"])


def open_groups(layout: Layout, backend: Backend, *, timeout_s: float, seed: int) -> Groups:
    """Join the job (torchrun's environment), build Megatron's groups, seed its generators."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not dist.is_initialized():
        dist.init_process_group(backend.collective, timeout=timedelta(seconds=timeout_s))
    if dist.get_world_size() != layout.world:
        raise ValueError(
            f"the layout is for {layout.world} learner ranks but {dist.get_world_size()} started"
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        order="tp-cp-ep-dp-pp",
        distributed_timeout_minutes=max(1, round(timeout_s / 60)),
    )
    model_parallel_cuda_manual_seed(seed)
    world = dist.group.WORLD
    assert world is not None
    groups = Groups(
        layout=layout,
        rank=dist.get_rank(),
        tp=parallel_state.get_tensor_model_parallel_group(),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        cp=parallel_state.get_context_parallel_group(),
        dp=parallel_state.get_data_parallel_group(),
        world=world,
    )
    _check_ranks(groups)
    return groups


@contextmanager
def alone(backend: Backend, *, seed: int) -> Iterator[Groups]:
    """A world of this process alone, before it joins the job; Megatron's part of it ends too."""
    from megatron.core import parallel_state

    dist.init_process_group(backend.collective, store=dist.HashStore(), rank=0, world_size=1)
    yield open_groups(Layout(world=1), backend, timeout_s=60.0, seed=seed)
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _check_ranks(groups: Groups) -> None:
    """Layout decides who holds which slice: Megatron must have made the same groups."""
    for axis in ("tp", "cp", "dp", "pp"):
        made = dist.get_process_group_ranks(getattr(groups, axis))
        if made not in groups.layout.groups(axis):
            raise RuntimeError(
                f"megatron-core put rank {groups.rank} in the {axis} group {made}, which is none "
                f"of {groups.layout.groups(axis)}: this megatron-core is not the pinned one"
            )
