"""Weight updates over a collective group of its own, in SGLang's protocol.

Tensors are broadcast one by one in list order, or as one uint8 bucket. FP8 weights come as codes
and scales in one call and are kept as the numbers they stand for. A call receives everything first
and writes the weights only when all of it fits, so a refused or broken call leaves weights and
version as they were.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from r1mega.rollout.engine.weights import Weights, check_names, load
from r1mega.rollout.p2p.receiver import Invitation, ReceiveFailed, receive
from r1mega.rollout.wire import join_group
from r1mega.weights import fp8
from r1mega.weights.blocks import scale_name, scale_shape, weight_name

LoadFormat = Literal["flattened_bucket"] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Payload:
    """What a call announces: parallel lists, in the order of the broadcasts."""

    names: Sequence[str]
    dtypes: Sequence[str]
    shapes: Sequence[Sequence[int]]
    load_format: LoadFormat = None


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

    def _group(self, name: str) -> dist.ProcessGroup:
        if name not in self._groups:
            raise ValueError(f"there is no group {name!r}: call /init_weights_update_group first")
        return self._groups[name]

    def begin(self) -> None:
        if self._in_session:
            raise ValueError("a weight update is already open: call /end_weight_update first")
        self._in_session = True

    def end(self) -> None:
        if not self._in_session:
            raise ValueError("no weight update is open: call /begin_weight_update first")
        self._in_session = False

    def receive_from_peers(self, invitation: str) -> None:
        """Receive slices into the weights themselves, which a broken call leaves half written."""
        self._check_session()
        try:
            receive(self._weights.named, Invitation.decode(invitation))
        except ReceiveFailed as error:
            raise ValueError(str(error)) from error

    def _check_session(self) -> None:
        if not self._in_session:
            raise ValueError(
                "weights can be updated only between /begin_weight_update and /end_weight_update"
            )

    def receive(self, payload: Payload, group_name: str) -> None:
        """Receive what is announced and load it; a payload that does not fit is still drained."""
        self._check_session()
        group = self._group(group_name)
        dtypes = [_dtype(name) for name in payload.dtypes]
        lengths = (len(payload.names), len(dtypes), len(payload.shapes))
        if len(set(lengths)) != 1:
            raise ValueError(f"names, dtypes and shapes have different lengths: {lengths}")
        try:
            tensors = _receive(payload, dtypes, group)
        except RuntimeError as error:
            raise ValueError(f"the broadcast over group {group_name!r} broke: {error}") from error
        received = as_numbers(dict(zip(payload.names, tensors, strict=True)))
        check_names(self._weights, received, [tensor.shape for tensor in received.values()])
        load(self._weights, received.items())


def as_numbers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """FP8 codes become what they stand for; raises ValueError when codes or scales are alone."""
    numbers = {}
    for name, tensor in tensors.items():
        if (weight := weight_name(name)) is not None:
            if weight not in tensors:
                raise ValueError(f"there are scales {name!r} in this call but no weight {weight!r}")
        elif tensor.dtype != torch.float8_e4m3fn:
            numbers[name] = tensor
        else:
            scales = tensors.get(scale_name(name))
            if scales is None or tuple(scales.shape) != scale_shape(tuple(tensor.shape)):
                raise ValueError(
                    f"parameter {name!r} comes in FP8: send {scale_name(name)!r} of shape "
                    f"{list(scale_shape(tuple(tensor.shape)))} in the same call"
                )
            numbers[name] = fp8.dequantize(tensor, scales)
    return numbers


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"there is no dtype {name!r}; send torch names such as 'float32'")
    return dtype


def _receive(
    payload: Payload, dtypes: Sequence[torch.dtype], group: dist.ProcessGroup
) -> list[Tensor]:
    if payload.load_format == "flattened_bucket":
        return _receive_bucket(payload.shapes, dtypes, group)
    tensors = [
        torch.empty(*shape, dtype=d) for shape, d in zip(payload.shapes, dtypes, strict=True)
    ]
    handles = [dist.broadcast(tensor, src=0, group=group, async_op=True) for tensor in tensors]
    for handle in handles:
        handle.wait()
    return tensors


def _receive_bucket(
    shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype], group: dist.ProcessGroup
) -> list[Tensor]:
    """One uint8 broadcast: the bytes of every tensor, one after the other.

    As SGLang's, it takes no tensor that begins elsewhere than at a multiple of its item size.
    """
    sizes = [prod(s) * d.itemsize for s, d in zip(shapes, dtypes, strict=True)]
    starts = accumulate(sizes, initial=0)
    if any(start % dtype.itemsize for start, dtype in zip(starts, dtypes, strict=False)):
        raise ValueError("a tensor of this bucket is not aligned: sort them by item size")
    bucket = torch.empty(sum(sizes), dtype=torch.uint8)
    dist.broadcast(bucket, src=0, group=group)
    parts = zip(bucket.split(sizes), dtypes, shapes, strict=True)
    return [part.view(dtype).view(*shape) for part, dtype, shape in parts]
