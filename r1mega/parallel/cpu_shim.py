"""Lets megatron-core 0.16.1 run on CPU and gloo: the one place that patches another package.

Only the CPU backend calls ``install``. Every name that is replaced must exist, so that an upgrade
of torch or megatron-core fails here and now, with the name, and not later with a wrong number.
"""

import contextlib
import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_INSTALLED_MARK = "_r1mega_cpu_shim"


class NullStream:
    """Stands in for torch.cuda.Stream: on CPU everything is in order already."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, other: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, event: Any = None) -> "NullEvent":
        return NullEvent()

    def query(self) -> bool:
        return True


class NullEvent:
    """Stands in for torch.cuda.Event."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True


def install() -> None:
    """Patch torch.cuda, tensor factories and megatron.core; a second call does nothing."""
    if hasattr(torch, _INSTALLED_MARK):
        return
    # torch.compile'd helpers of megatron-core would start the C++ compiler in every rank.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    _patch_cuda()
    _patch_factories()
    _patch_tensor_type()
    _patch_megatron()
    setattr(torch, _INSTALLED_MARK, True)


def _replace(owner: Any, name: str, new: Any) -> None:
    _existing(owner, name)
    setattr(owner, name, new)


def _existing(owner: Any, name: str) -> Any:
    if not hasattr(owner, name):
        raise RuntimeError(
            f"the CPU shim replaces {getattr(owner, '__name__', owner)}.{name}, which does not "
            "exist: this torch or megatron-core is not the pinned one (see pyproject.toml)"
        )
    return getattr(owner, name)


def _patch_cuda() -> None:
    """About sixty sites of megatron.core ask for torch.cuda's current device or its streams."""
    stream = NullStream()
    replacements: dict[str, Any] = {
        "current_device": lambda: torch.device("cpu"),
        "set_device": lambda device: None,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "Stream": NullStream,
        "Event": NullEvent,
        "current_stream": lambda *_: stream,
        "default_stream": lambda *_: stream,
        "stream": lambda s: contextlib.nullcontext(s),
        "manual_seed": lambda seed: torch.random.default_generator.manual_seed(int(seed)),
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
    }
    for name, new in replacements.items():
        _replace(torch.cuda, name, new)


def _patch_factories() -> None:
    """Literals ``device="cuda"`` and pinned memory in masks, schedules and the optimizer."""
    names = "empty zeros ones full tensor arange as_tensor empty_like zeros_like ones_like"
    for name in names.split():
        _replace(torch, name, _on_cpu(_existing(torch, name)))
    _replace(torch.Tensor, "cuda", lambda self, *_, **__: self)


def _on_cpu(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return wrapped


def _patch_tensor_type() -> None:
    """megatron.core.optimizer, and nobody else, compares types with 'torch.cuda.FloatTensor'."""
    original = torch.Tensor.type

    def type_(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if isinstance(result, str):
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith("megatron.core.optimizer"):
                return result.replace("torch.", "torch.cuda.", 1)
        return result

    _replace(torch.Tensor, "type", type_)


def _patch_megatron() -> None:
    from megatron.core.tensor_parallel import mappings, random
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    from r1mega.parallel.duplicated_linear import DuplicatedLinear

    _patch_rng(random)
    _define_missing_te_names(moe_utils)
    _patch_dispatcher(token_dispatcher)
    _patch_uneven_collectives(mappings)
    # Without TE this name is a placeholder; MLA picks "duplicated" by identity with it.
    _replace(multi_latent_attention, "TELinear", DuplicatedLinear)


def _patch_rng(random: ModuleType) -> None:
    """The tracker forks the CPU generator instead of a CUDA one."""

    @contextlib.contextmanager
    def fork(self: Any, name: str = random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        outer = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outer)

    _replace(random, "_get_cuda_rng_state", lambda *_, **__: torch.get_rng_state())
    _replace(random, "_set_cuda_rng_state", lambda state, *_, **__: torch.set_rng_state(state))
    _replace(random.CudaRNGStatesTracker, "fork", fork)


def _define_missing_te_names(moe_utils: ModuleType) -> None:
    """0.16.1 reads these unconditionally but defines them only when TransformerEngine imports."""
    names = (
        "te_general_gemm fused_permute fused_unpermute fused_sort_chunks_by_index "
        "fused_permute_with_probs fused_sort_chunks_by_index_with_probs "
        "fused_topk_with_score_function fused_compute_score_for_moe_aux_loss fused_moe_aux_loss"
    )
    source = inspect.getsource(moe_utils)
    for name in names.split():
        if hasattr(moe_utils, name):
            continue
        if name not in source:
            raise RuntimeError(
                f"the CPU shim defines moe_utils.{name}, which nothing reads any more"
            )
        setattr(moe_utils, name, None)


def _patch_dispatcher(token_dispatcher: ModuleType) -> None:
    """all_to_all_single takes split sizes as ints; upstream converts CUDA tensors only."""
    original = _existing(token_dispatcher, "maybe_move_tensor_to_cpu")

    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if isinstance(tensor, Tensor) and as_numpy:
            return tensor.numpy()
        return original(tensor, as_numpy=as_numpy, record_stream=False)

    _replace(token_dispatcher, "maybe_move_tensor_to_cpu", move)


def _patch_uneven_collectives(mappings: ModuleType) -> None:
    """gloo has no uneven all-gather and reduce-scatter (the all-to-all dispatcher with etp > 1)."""
    gather_even = _existing(mappings, "_gather_along_first_dim")
    scatter_even = _existing(mappings, "_reduce_scatter_along_first_dim")

    def gather(
        input_: Tensor, group: Any, output_split_sizes: Sequence[int] | None = None, *rest: Any
    ) -> Tensor:
        if output_split_sizes is None or group.size() == 1:
            return gather_even(input_, group, output_split_sizes, *rest)
        longest = max(output_split_sizes)
        padded = input_.new_zeros((longest, *input_.shape[1:]))
        padded[: input_.shape[0]] = input_
        parts = [torch.empty_like(padded) for _ in output_split_sizes]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([p[:n] for p, n in zip(parts, output_split_sizes, strict=True)])

    def scatter(
        input_: Tensor, group: Any, input_split_sizes: Sequence[int] | None = None, *rest: Any
    ) -> Tensor:
        if input_split_sizes is None or group.size() == 1:
            return scatter_even(input_, group, input_split_sizes, *rest)
        total = input_.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total.split(list(input_split_sizes))[group.rank()].contiguous()

    _replace(mappings, "_gather_along_first_dim", gather)
    _replace(mappings, "_reduce_scatter_along_first_dim", scatter)
