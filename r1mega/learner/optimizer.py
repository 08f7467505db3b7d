"""Megatron's distributed optimizer: how it is built, stepped, and what of it a checkpoint keeps."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from r1mega.config import schema
from r1mega.learner.pipeline import sum_gradients
from r1mega.weights.checkpoints.flat_ranges import Parameter

MOMENTS = ("exp_avg", "exp_avg_sq")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def wrap_chunks(
    config: TransformerConfig, chunks: Sequence[torch.nn.Module], learner: schema.Learner
) -> list[DistributedDataParallel]:
    """Megatron's DDP around filled chunks: gradients are summed and sharded over dp."""
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=learner.gradients == "fp32",
        use_distributed_optimizer=True,
        overlap_grad_reduce=learner.overlap_grad_reduce,
        overlap_param_gather=learner.overlap_param_gather,
        bucket_size=learner.bucket_parameters,
        check_for_nan_in_grad=False,  # the learner checks loss and norm, and says more
    )
    return [DistributedDataParallel(config, ddp, chunk) for chunk in chunks]


def open_optimizer(
    config: TransformerConfig, chunks: list[DistributedDataParallel], learner: schema.Learner
) -> Any:
    """AdamW with fp32 master weights sharded over dp, and the schedule's hooks on ``config``."""
    offload, bf16 = learner.optimizer_offload > 0, learner.precision == "bf16"
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=learner.lr,
            weight_decay=learner.weight_decay,
            adam_beta1=learner.adam_beta1,
            adam_beta2=learner.adam_beta2,
            adam_eps=learner.adam_eps,
            clip_grad=learner.clip_grad,
            bf16=bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=True,
            overlap_param_gather=learner.overlap_param_gather,
            # When offloading it spares the device a second copy of the masters.
            use_precision_aware_optimizer=learner.precision_aware_optimizer or (offload and bf16),
            main_grads_dtype=_DTYPES[learner.gradients],
            exp_avg_dtype=_DTYPES[learner.moments],
            exp_avg_sq_dtype=_DTYPES[learner.moments],
            optimizer_cpu_offload=offload,
            optimizer_offload_fraction=learner.optimizer_offload,
            overlap_cpu_optimizer_d2h_h2d=offload,
        ),
        chunks,
    )
    config.finalize_model_grads_func = sum_gradients
    config.grad_scale_func = optimizer.scale_loss
    if learner.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return optimizer


def finish_gather(chunks: Sequence[DistributedDataParallel]) -> None:
    """Gather updated weights that no forward pass has asked for yet (overlap_param_gather)."""
    for chunk in chunks:
        for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
            if group.param_gather_handle is not None or not group.param_gather_dispatched:
                group.start_param_sync(force_sync=True)


def apply_gradients(optimizer: Any, *, lr: float, weight_decay: float) -> float:
    """One update at ``lr``; norms and biases are not decayed. Returns the norm before clipping."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_mult"]
        group["weight_decay"] = weight_decay * group["wd_mult"]
    succeeded, grad_norm, _ = optimizer.step()
    if not succeeded:
        raise RuntimeError(f"the optimizer refused the update: gradient norm {grad_norm}")
    return float(grad_norm)


def optimizer_state(optimizer: Any, chunks: Sequence[DistributedDataParallel]) -> dict[str, Tensor]:
    """This rank's ungathered part, live: per parameter its flat range, fp32 weights and moments.

    Keys are ``<chunk>/<parameter>/<exp_avg | exp_avg_sq | param | step | range>``; ``param`` of the
    precision-aware optimizer is what the bf16 weights lack of fp32.
    """
    state: dict[str, Tensor] = {}
    for owned in _owned(optimizer, chunks):
        if not owned.moments:
            continue  # before the first update there is nothing to keep
        step = owned.counter["step"]
        key = f"{owned.chunk}/{owned.name}"
        state[f"{key}/range"] = torch.tensor(owned.span)
        state[f"{key}/param"] = owned.master.detach()
        state[f"{key}/step"] = torch.as_tensor(step, dtype=torch.float32).reshape(1)
        for name in MOMENTS:
            state[f"{key}/{name}"] = owned.moments[name]
    return state


@torch.no_grad()
def load_optimizer_state(
    optimizer: Any,
    chunks: Sequence[DistributedDataParallel],
    read: Callable[[Parameter, tuple[int, int]], dict[str, Tensor]],
) -> None:
    """Take over what ``read`` knows of each flat range that this rank owns; one at a time.

    Raises ValueError where masters were kept in another form.
    """
    for owned in _owned(optimizer, chunks):
        values = read((owned.chunk, owned.name), owned.span)
        if (values["param"].dtype == torch.int16) != (owned.master_dtype == torch.int16):
            raise ValueError(
                "the fp32 weights were saved in two halves by the precision-aware optimizer, and "
                "this one keeps them whole, or the other way round: go on with the old "
                "learner.precision_aware_optimizer and optimizer_offload, or start a new run from "
                "the weights with model.init"
            )
        if owned.main.dtype == torch.float32:
            owned.main.copy_(values["param"])
        else:
            owned.moments["master_param"] = values["param"].to(owned.main.device)
        owned.restore_step(values["step"])
        for name in MOMENTS:
            owned.moments[name] = values[name].to(owned.main.device, owned.moment_dtype)
    if next(chunks[0].parameters()).dtype == torch.float32:
        _share_parameters(chunks)  # owners took over fp32 weights that others may have rounded


@torch.no_grad()
def show_gradients(
    optimizer: Any, chunks: Sequence[DistributedDataParallel], *, adam_beta1: float
) -> None:
    """Put the clipped gradients of the first update in the place of the weights, on every rank.

    Gradients are whole nowhere, but the first moment is (1 - beta1) times its owner's part, and the
    way of updated weights to all ranks is theirs too.
    """
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.zero_()
    for owned in _owned(optimizer, chunks):
        part = owned.parameter.view(-1)[slice(*owned.span)]
        part.copy_(owned.moments["exp_avg"] / (1 - adam_beta1))
    _share_parameters(chunks)


def _share_parameters(chunks: Sequence[DistributedDataParallel]) -> None:
    """Every rank gets what the owners have."""
    for chunk in chunks:
        chunk.start_param_sync(force_sync=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Owned:
    """The part of one parameter that this rank updates."""

    chunk: int
    name: str  # Megatron's
    parameter: Tensor
    span: tuple[int, int]  # flat range in the parameter
    main: Tensor  # what the inner optimizer updates: fp32, or bf16 when it keeps masters itself
    moments: dict[str, Any]  # the inner optimizer's state
    group: dict[str, Any]  # the inner optimizer's parameter group
    counts_alone: bool  # torch's AdamW counts updates per parameter, FusedAdam per group
    config: OptimizerConfig

    @property
    def master(self) -> Tensor:
        master: Tensor = self.moments.get("master_param", self.main)
        return master

    @property
    def master_dtype(self) -> torch.dtype:
        halves = self.main.dtype != torch.float32 and self.config.store_param_remainders
        return torch.int16 if halves else torch.float32

    @property
    def moment_dtype(self) -> torch.dtype:
        chosen: torch.dtype = self.config.exp_avg_dtype
        return chosen if self.config.use_precision_aware_optimizer else torch.float32

    @property
    def counter(self) -> dict[str, Any]:
        return self.moments if self.counts_alone else self.group

    def restore_step(self, step: Tensor) -> None:
        # A tensor of its own: a shared one would count once per parameter.
        self.counter["step"] = step.reshape(()).clone() if self.counts_alone else int(step.item())


def _owned(optimizer: Any, chunks: Sequence[DistributedDataParallel]) -> Iterator[_Owned]:
    names = {
        parameter: (number, name.replace("module.", ""))
        for number, chunk in enumerate(chunks)
        for name, parameter in chunk.named_parameters()
    }
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        outer = part.optimizer
        hybrid = isinstance(outer, HybridDeviceOptimizer)
        holders = {
            id(main): (main, inner.state[main], group, isinstance(inner, torch.optim.AdamW))
            for inner in (outer.sub_optimizers if hybrid else [outer])
            for group in inner.param_groups
            for main in group["params"]
        }
        for parameter, (group, order) in part.model_param_group_index_map.items():
            span = part._get_model_param_range_map(parameter)["param"]
            shard = outer.param_groups[group]["params"][order]
            main, moments, inner_group, counts_alone = holders[
                id(outer.param_to_inner_param[shard] if hybrid else shard)
            ]
            chunk, name = names[parameter]
            yield _Owned(
                chunk=chunk,
                name=name,
                parameter=parameter,
                span=(span.start, span.end),
                main=main,
                moments=moments,
                group=inner_group,
                counts_alone=counts_alone,
                config=part.config,
            )
