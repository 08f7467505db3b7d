"""Megatron's distributed optimizer: how it is built, stepped, and what of it a checkpoint keeps."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import Tensor

from r1mega.config import schema
from r1mega.learner.pipeline import sum_gradients

MOMENTS = ("exp_avg", "exp_avg_sq")


def wrap_chunks(
    config: MLATransformerConfig, chunks: Sequence[torch.nn.Module], *, overlap: bool
) -> list[DistributedDataParallel]:
    """Megatron's DDP around filled chunks: gradients are summed in fp32 and sharded over dp."""
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=overlap,
        check_for_nan_in_grad=False,  # the learner checks loss and norm, and says more
    )
    return [DistributedDataParallel(config, ddp, chunk) for chunk in chunks]


def open_optimizer(
    config: MLATransformerConfig, chunks: list[DistributedDataParallel], learner: schema.Learner
) -> Any:
    """AdamW with fp32 master weights sharded over dp, and the schedule's hooks on ``config``."""
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=learner.lr,
            weight_decay=learner.weight_decay,
            adam_beta1=learner.adam_beta1,
            adam_beta2=learner.adam_beta2,
            adam_eps=learner.adam_eps,
            clip_grad=learner.clip_grad,
            bf16=learner.precision == "bf16",
            params_dtype=config.params_dtype,
            use_distributed_optimizer=True,
        ),
        chunks,
    )
    config.finalize_model_grads_func = sum_gradients
    config.grad_scale_func = optimizer.scale_loss
    if learner.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return optimizer


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
    """This rank's ungathered part: per parameter its flat range, fp32 weights and moments.

    Keys are ``<chunk>/<parameter>/<exp_avg | exp_avg_sq | param | step | range>``.
    """
    state: dict[str, Tensor] = {}
    for owned in _owned(optimizer, chunks):
        if not owned.moments:
            continue  # before the first update there is nothing to keep
        step = owned.step_holder()["step"]
        state[f"{owned.key}/range"] = torch.tensor(owned.span)
        state[f"{owned.key}/param"] = owned.main.detach().clone()
        state[f"{owned.key}/step"] = torch.as_tensor(step, dtype=torch.float32).reshape(1)
        for name in MOMENTS:
            state[f"{owned.key}/{name}"] = owned.moments[name].clone()
    return state


@torch.no_grad()
def load_optimizer_state(
    optimizer: Any, chunks: Sequence[DistributedDataParallel], state: dict[str, Tensor]
) -> None:
    """Inverse of ``optimizer_state`` on the same layout; raises ValueError when ranges differ."""
    for owned in _owned(optimizer, chunks):
        key = owned.key
        if f"{key}/range" not in state:
            continue
        saved = tuple(state[f"{key}/range"].tolist())
        if saved != owned.span:
            raise ValueError(
                f"the optimizer state of {key} covers elements {saved} but this rank owns "
                f"{owned.span}: the checkpoint was written under another layout"
            )
        owned.main.copy_(state[f"{key}/param"])
        owned.restore_step(state[f"{key}/step"])
        for name in MOMENTS:
            owned.moments[name] = state[f"{key}/{name}"].to(owned.main.device).clone()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Owned:
    """The part of one parameter that this rank updates."""

    key: str
    span: tuple[int, int]  # flat range in the parameter
    main: Tensor  # its fp32 weights
    moments: dict[str, Any]  # the inner optimizer's state
    group: dict[str, Any]  # the inner optimizer's parameter group

    def step_holder(self) -> dict[str, Any]:
        """torch's AdamW counts updates per parameter, TransformerEngine's FusedAdam per group."""
        return self.group if "step" in self.group else self.moments

    def restore_step(self, step: Tensor) -> None:
        if "step" in self.group:
            self.group["step"] = int(step.item())
        else:
            # A tensor of its own: a shared one would count once per parameter.
            self.moments["step"] = step.reshape(()).clone()


def _owned(optimizer: Any, chunks: Sequence[DistributedDataParallel]) -> Iterator[_Owned]:
    names = {
        parameter: f"{number}/{name.replace('module.', '')}"
        for number, chunk in enumerate(chunks)
        for name, parameter in chunk.named_parameters()
    }
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for parameter, (group, order) in part.model_param_group_index_map.items():
            span = part._get_model_param_range_map(parameter)["param"]
            inner_group = part.optimizer.param_groups[group]
            main = inner_group["params"][order]
            yield _Owned(
                key=names[parameter],
                span=(span.start, span.end),
                main=main,
                moments=part.optimizer.state[main],
                group=inner_group,
            )
