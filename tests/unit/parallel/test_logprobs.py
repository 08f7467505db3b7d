"""Fused log-probs and entropies against autograd through a whole log_softmax, in float64."""

from collections.abc import Iterator
from math import log

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close

from r1mega.parallel.logprobs import VOCAB_BLOCK, vocab_parallel_logprobs

T, H = 11, 5
V = 2 * VOCAB_BLOCK + 100  # three blocks, the last one smaller


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def inputs(dtype: torch.dtype = torch.float64, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, H, generator=g, dtype=torch.float64) * scale
    weight = torch.randn(V, H, generator=g, dtype=torch.float64)
    edges = torch.tensor([0, VOCAB_BLOCK - 1, VOCAB_BLOCK, V - 1, V - 1])
    targets = torch.cat([edges, torch.randint(0, V, (T - len(edges),), generator=g)])
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def fused(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk_tokens: int = 4
) -> tuple[Tensor, Tensor]:
    return vocab_parallel_logprobs(
        hidden, weight, targets, temperature=0.7, chunk_tokens=chunk_tokens, group=dist.group.WORLD
    )


def full(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    table = (hidden @ weight.T / 0.7).log_softmax(-1)
    return table.gather(-1, targets[:, None]).squeeze(-1), -(table.exp() * table).sum(-1)


def backward(results: tuple[Tensor, Tensor], logprob: float = 1.0, entropy: float = 1.0) -> None:
    """Through any function of both: here a sum with weights of either sign."""
    weights = torch.randn(2, T, generator=torch.Generator().manual_seed(1))
    (logprob * weights[0] * results[0] + entropy * weights[1] * results[1]).sum().backward()


@pytest.mark.parametrize("chunk_tokens", [1, 4, 1000])
@pytest.mark.parametrize(("logprob", "entropy"), [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_values_and_gradients(chunk_tokens: int, logprob: float, entropy: float) -> None:
    ours, reference = inputs(), inputs()
    results, expected = fused(*ours, chunk_tokens=chunk_tokens), full(*reference)
    assert_close(results, expected, rtol=1e-12, atol=1e-12)
    backward(results, logprob, entropy)
    backward(expected, logprob, entropy)
    for mine, theirs in zip(ours[:2], reference[:2], strict=True):
        assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-13)


def test_an_entropy_without_gradient_changes_no_bit() -> None:
    with_zeros, alone = inputs(torch.float32), inputs(torch.float32)
    backward(fused(*with_zeros), entropy=0.0)
    logprobs, _ = fused(*alone)
    backward((logprobs, torch.zeros(T)))
    for mine, other in zip(with_zeros[:2], alone[:2], strict=True):
        assert torch.equal(mine.grad, other.grad)


def test_large_logits_lose_no_more_than_their_own_rounding() -> None:
    """Of 1e4 and more: neither overflow nor log-probs as coarse as the logits themselves."""
    ours, reference = inputs(torch.float32, 3e3), inputs(torch.float64, 3e3)
    results, expected = fused(*ours), full(*reference)
    assert expected[0].min() < -1e4
    assert_close(results[0].double(), expected[0], rtol=1e-6, atol=5e-3)
    backward(results)
    assert all(torch.isfinite(leaf.grad).all() for leaf in ours[:2])


def test_shifted_logits_give_the_same_probabilities() -> None:
    """A common offset of 4096 (exact in fp32) cancels, in values and in gradients."""
    g = torch.Generator().manual_seed(2)
    weight = torch.randint(-4, 5, (V, H), generator=g).float()
    weight[:, 0] = 1.0
    hidden = torch.randint(-2, 3, (T, H), generator=g).float()
    targets = torch.randint(0, V, (T,), generator=g)
    leaves = []
    for offset in (0.0, 4096.0):
        moved = hidden.clone()
        moved[:, 0] += offset
        pair = (moved.requires_grad_(), weight.clone().requires_grad_())
        results = vocab_parallel_logprobs(
            *pair, targets, temperature=1.0, chunk_tokens=4, group=dist.group.WORLD
        )
        backward(results)
        leaves.append((*results, pair[0].grad))
    for near, far in zip(*leaves, strict=True):
        assert torch.equal(near, far)


def test_equal_logits_are_uniform() -> None:
    hidden, weight, targets = torch.zeros(T, H), torch.ones(V, H, requires_grad=True), inputs()[2]
    logprobs, entropies = fused(hidden, weight, targets)
    assert logprobs.tolist() == pytest.approx([-log(V)] * T)
    assert entropies.tolist() == pytest.approx([log(V)] * T)


def test_a_frozen_weight_gets_no_gradient() -> None:
    ours, reference = inputs(), inputs()
    for leaves in (ours, reference):
        leaves[1].requires_grad_(False)
    backward(fused(*ours))
    backward(full(*reference))
    assert_close(ours[0].grad, reference[0].grad, rtol=1e-10, atol=1e-13)
    assert ours[1].grad is None


def test_no_targets() -> None:
    _, weight, _ = inputs(torch.float32)
    hidden = torch.zeros(0, H, requires_grad=True)
    logprobs, entropies = fused(hidden, weight, torch.zeros(0, dtype=torch.int64))
    (logprobs.sum() + entropies.sum()).backward()
    assert logprobs.shape == entropies.shape == (0,)
    assert hidden.grad.shape == (0, H)
    assert not weight.grad.any()


def test_bf16_is_summed_in_fp32() -> None:
    """So that gradients are no further from exact ones than autograd's in bf16."""
    ours, naive = inputs(torch.bfloat16), inputs(torch.bfloat16)
    exact = [leaf.detach().double().requires_grad_() for leaf in ours[:2]]
    results, expected = fused(*ours), full(*exact, ours[2])
    assert results[0].dtype == results[1].dtype == torch.float32
    for each in (results, expected, full(*naive)):
        backward(each)
    for mine, theirs, truth in zip(ours[:2], naive[:2], exact, strict=True):
        assert mine.grad.dtype == torch.bfloat16
        assert (mine.grad - truth.grad).norm() < (theirs.grad - truth.grad).norm()
