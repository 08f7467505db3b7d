"""Vocabulary-parallel log-probs and entropies equal a full softmax, gradients too, in float64."""

import pytest
import torch

from tests.distributed.launch import run_ranks

T, H, V = 23, 6, 9216  # 9216 / world rows are one, two or three blocks
TEMPERATURE = 0.7


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden, weight, upstream = (
        torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((T, H), (V, H), (2, T))
    )
    return hidden, weight, torch.randint(0, V, (T,), generator=g), upstream


def sharded(chunk_tokens: int) -> dict[str, list]:
    """Runs on every rank of a tensor-parallel group."""
    import torch.distributed as dist

    from r1mega.parallel.logprobs import vocab_parallel_logprobs

    dist.init_process_group("gloo")
    world = dist.group.WORLD
    hidden, weight, targets, upstream = inputs()
    rows = V // dist.get_world_size()
    part = weight[dist.get_rank() * rows : (dist.get_rank() + 1) * rows].clone().requires_grad_()
    hidden.requires_grad_()
    results = vocab_parallel_logprobs(
        hidden, part, targets, temperature=TEMPERATURE, chunk_tokens=chunk_tokens, group=world
    )
    (torch.stack(results) * upstream).sum().backward()
    dist.all_reduce(hidden.grad)
    return {
        "logprobs": results[0].tolist(),
        "entropies": results[1].tolist(),
        "hidden": hidden.grad.flatten().tolist(),
        "weight": part.grad.flatten().tolist(),
    }


@pytest.mark.parametrize(("world", "chunk_tokens"), [(1, 8), (2, 1000), (4, 5)])
def test_equals_full_softmax(world: int, chunk_tokens: int) -> None:
    hidden, weight, targets, upstream = inputs()
    hidden.requires_grad_()
    weight.requires_grad_()
    table = (hidden @ weight.T / TEMPERATURE).log_softmax(-1)
    logprobs = table[torch.arange(T), targets]
    entropies = -(table.exp() * table).sum(-1)
    (torch.stack([logprobs, entropies]) * upstream).sum().backward()

    ranks = run_ranks(__name__, "sharded", world=world, chunk_tokens=chunk_tokens)
    for rank in ranks:
        assert rank["logprobs"] == pytest.approx(logprobs.tolist(), abs=1e-10)
        assert rank["entropies"] == pytest.approx(entropies.tolist(), abs=1e-10)
        assert rank["hidden"] == pytest.approx(hidden.grad.flatten().tolist(), abs=1e-10)
    grad_weight = [value for rank in ranks for value in rank["weight"]]
    assert grad_weight == pytest.approx(weight.grad.flatten().tolist(), abs=1e-10)
