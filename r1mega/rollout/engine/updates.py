"""Weight updates over a collective group of its own, in SGLang's protocol.

Tensors are broadcast one by one in list order. A call receives everything first and writes the
weights only when all of it fits, so a refused or broken call leaves weights and version as they
were.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from r1mega.rollout.engine.weights import Weights, check_names, load
from r1mega.rollout.wire import join_group


class WeightUpdater:
    """Groups by name, and the session outside of which distributed updates are refused."""

    def __init__(self, weights: Weights, *, timeout_s: float) -> None:
        self._weights = weights
        self._timeout_s = timeout_s
        self._groups: dict[str, dist.ProcessGroup] = {}
        self._in_session = False

    def init_group(
        self, *, address: str, port: int, rank: int, world_size: int, name: str, backend: str
    ) -> None:
        """Blocks until the trainer and all other ranks have joined."""
        if backend != "gloo":
            raise ValueError(f"backend is {backend!r}; this engine runs on CPU: use 'gloo'")
        if not 0 < rank < world_size:
            raise ValueError(f"rank_offset {rank} must lie in [1, world_size {world_size})")
        if name in self._groups:
            raise ValueError(f"group {name!r} exists: destroy it or choose another name")
        try:
            self._groups[name] = join_group(
                address=address,
                port=port,
                rank=rank,
                world_size=world_size,
                name=name,
                backend=backend,
                join_timeout_s=self._timeout_s,
                timeout_s=self._timeout_s,
            )
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"cannot join group {name!r} at {address}:{port}: {error}") from error

    def destroy_group(self, name: str) -> None:
        self._group(name)
        dist.destroy_process_group(self._groups.pop(name))

    def begin(self) -> None:
        if self._in_session:
            raise ValueError("a weight update is already open: call /end_weight_update first")
        self._in_session = True

    def end(self) -> None:
        if not self._in_session:
            raise ValueError("no weight update is open: call /begin_weight_update first")
        self._in_session = False

    def receive(
        self,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        group_name: str,
    ) -> None:
        """Receive what is announced, in its order; what does not fit is drained and refused."""
        if not self._in_session:
            raise ValueError(
                "weights can be updated only between /begin_weight_update and /end_weight_update"
            )
        group = self._group(group_name)
        lengths = (len(names), len(dtypes), len(shapes))
        if len(set(lengths)) != 1:
            raise ValueError(f"names, dtypes and shapes have different lengths: {lengths}")
        tensors = [
            torch.empty(*shape, dtype=_dtype(name))
            for shape, name in zip(shapes, dtypes, strict=True)
        ]
        try:
            works = [dist.broadcast(t, src=0, group=group, async_op=True) for t in tensors]
            for work in works:
                work.wait()
        except RuntimeError as error:
            raise ValueError(f"the broadcast over group {group_name!r} broke: {error}") from error
        check_names(self._weights, names, shapes)
        load(self._weights, zip(names, tensors, strict=True))

    def _group(self, name: str) -> dist.ProcessGroup:
        if name not in self._groups:
            raise ValueError(f"there is no group {name!r}: call /init_weights_update_group first")
        return self._groups[name]


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"there is no dtype {name!r}; send torch names such as 'float32'")
    return dtype
