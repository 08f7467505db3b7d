"""A linear layer whose weight is the same on every tensor-parallel rank."""

from typing import Any

import torch
from torch import Tensor


class DuplicatedLinear(torch.nn.Module):
    """Stands in for TransformerEngine's ``TELinear(parallel_mode="duplicated")``.

    MLA's down projections need it: megatron-core 0.16.1's ColumnParallelLinear in that place gives
    wrong gradients at tp=2 (relative error 0.7 on the k_pe rows). Input [S/tp, B, H_in] (its own
    sequence shard), output [S/tp, B, H_out]; the mark ``sequence_parallel`` asks Megatron to sum
    the gradient over tp.
    """

    def __init__(
        self, input_size: int, output_size: int, *, config: Any, init_method: Any, **_: Any
    ) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(
            torch.empty(output_size, input_size, dtype=config.params_dtype)
        )
        if config.perform_initialization:
            init_method(self.weight)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return torch.nn.functional.linear(x, self.weight), None
