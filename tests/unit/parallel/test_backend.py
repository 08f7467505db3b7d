"""The CPU backend's choice of products: faster, and still fp32."""

import torch

from r1mega.parallel.backend import prefer_onednn


def test_products_stay_fp32() -> None:
    matmul = torch.backends.mkldnn.matmul
    usual = matmul.fp32_precision
    try:
        prefer_onednn()
        g = torch.Generator().manual_seed(1)
        for rows, inner, columns in ((8, 16, 8), (300, 64, 100), (256, 512, 1024)):
            left = torch.randn(rows, inner, generator=g)
            right = torch.randn(inner, columns, generator=g)
            exact = left.double() @ right.double()
            assert (left @ right - exact).norm() < 1e-6 * exact.norm()
    finally:
        matmul.fp32_precision = usual
