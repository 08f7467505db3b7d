"""Fused log-probs on CUDA in bf16: gradients are summed in fp32 there, without rounded products."""

import pytest
import torch
import torch.distributed as dist

from r1mega.parallel.logprobs import VOCAB_BLOCK, vocab_parallel_logprobs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
T, H, V = 300, 64, 3 * VOCAB_BLOCK


def test_gradients_are_as_exact_as_bf16_logits() -> None:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        g = torch.Generator(device="cuda").manual_seed(0)
        hidden = torch.randn(T, H, generator=g, device="cuda").bfloat16().requires_grad_()
        weight = torch.randn(V, H, generator=g, device="cuda").mul_(0.3).bfloat16().requires_grad_()
        targets = torch.randint(0, V, (T,), generator=g, device="cuda")
        exact = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight)]
        logprobs, entropies = vocab_parallel_logprobs(
            hidden, weight, targets, temperature=1.0, chunk_tokens=128, group=dist.group.WORLD
        )
        table = (exact[0] @ exact[1].T).log_softmax(-1)
        expected = table.gather(-1, targets[:, None]).squeeze(-1)
        (logprobs.sum() + entropies.sum()).backward()
        (expected.sum() - (table.exp() * table).sum()).backward()
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=0.03)
    for leaf, truth in zip((hidden, weight), exact, strict=True):
        assert (leaf.grad - truth.grad).norm() < 0.01 * truth.grad.norm()
