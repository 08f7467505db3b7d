"""Products with weights, by the library that is faster for their size.

MKL has no AVX-512 kernels for processors that are not Intel's; oneDNN has, but takes longer to
start. Which one a weight meets depends on its size only, so a row's bits stay a function of the row
(see network.py for what the number of rows has to be).

Legend: N rows, D input width, F output width, E experts, S rows sorted by expert.
"""

import torch
from torch import Tensor
from torch.nn import functional

_ONEDNN_FROM = 1 << 14  # numbers in a weight: 128 x 128 (measured with 64 rows)
_ONEDNN_EXPERT_FROM = 1 << 16  # an expert has fewer rows, and pays for each start


def linear(x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias."""
    if weight_FD.numel() >= _ONEDNN_FROM and torch.backends.mkldnn.is_available():
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            x_ND, weight_FD, bias_F, "none", [], ""
        )
        return product
    return functional.linear(x_ND, weight_FD, bias_F)


def grouped(x_SD: Tensor, weight_EFD: Tensor, counts_E: list[int]) -> Tensor:
    """The first rows times the first expert's weight, and so on."""
    if weight_EFD[0].numel() >= _ONEDNN_EXPERT_FROM:
        pairs = zip(x_SD.split(counts_E), weight_EFD, strict=True)
        return torch.cat([linear(x, weight) for x, weight in pairs])
    ends_E = torch.tensor(counts_E, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return functional.grouped_mm(x_SD, weight_EFD.transpose(1, 2), offs=ends_E)
