"""The two kinds of machine behind one small interface: CPU with gloo, CUDA with NCCL."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    """Where tensors live and which library moves them."""

    device: torch.device
    collective: Literal["gloo", "nccl"]

    def rng_state(self) -> dict[str, Tensor]:
        """Generator states of this rank, as byte tensors."""
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state()
        return states

    def set_rng_state(self, states: dict[str, Tensor]) -> None:
        torch.set_rng_state(states["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"])


def open_backend(kind: Literal["cpu", "cuda"]) -> Backend:
    """Prepare this process for ``kind``; call it before megatron.core is imported."""
    if kind == "cpu":
        if torch.cuda.is_available():
            raise ValueError(
                "cluster.backend is cpu but this machine shows CUDA devices; hide them with "
                "CUDA_VISIBLE_DEVICES= or set cluster.backend=cuda"
            )
        from r1mega.parallel import cpu_shim

        cpu_shim.install()
        torch.set_num_threads(1)  # a second thread per rank costs more than it brings
        return Backend(device=torch.device("cpu"), collective="gloo")
    if not torch.cuda.is_available():
        raise ValueError(
            "cluster.backend is cuda but no CUDA device is visible; use cluster.backend=cpu"
        )
    # Overlap of tensor-parallel communication with GEMMs needs one hardware queue.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return Backend(device=device, collective="nccl")


@contextmanager
def onednn_products() -> Iterator[None]:
    """Large fp32 products on a CPU by oneDNN, which on AMD's AVX-512 takes half the time of MKL.

    Not for a whole process: PyTorch's CPU attention takes five times as long with it on short
    sequences. The switch that selects it also permits bf16 arithmetic, which oneDNN makes use of
    where there is AMX; there, nothing is switched.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    usual = matmul.fp32_precision
    matmul.fp32_precision = "bf16" if _onednn_keeps_fp32() else usual
    try:
        yield
    finally:
        matmul.fp32_precision = usual


@cache
def _onednn_keeps_fp32() -> bool:
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    usual, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    sample = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    exact = sample.double() @ sample.double()
    error = (sample @ sample - exact).norm() / exact.norm()
    matmul.fp32_precision = usual
    return error.item() < 1e-6
