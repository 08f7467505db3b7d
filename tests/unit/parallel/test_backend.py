"""Products by oneDNN: faster, still fp32, and only where they are asked for."""

import torch

from r1mega.parallel.backend import onednn_products


def test_products_stay_fp32() -> None:
    g = torch.Generator().manual_seed(1)
    usual = torch.backends.mkldnn.matmul.fp32_precision
    with onednn_products():
        for rows, inner, columns in ((8, 16, 8), (300, 64, 100), (256, 512, 1024)):
            left = torch.randn(rows, inner, generator=g)
            right = torch.randn(inner, columns, generator=g)
            exact = left.double() @ right.double()
            assert (left @ right - exact).norm() < 1e-6 * exact.norm()
    assert torch.backends.mkldnn.matmul.fp32_precision == usual
