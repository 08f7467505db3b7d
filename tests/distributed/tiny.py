"""Small models for tests, the same in transformers and in the learner."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from r1mega.config import schema
from r1mega.config.derived import MtpMode
from r1mega.model.hf_config import hf_config
from r1mega.parallel.backend import open_backend
from r1mega.parallel.groups import Groups, open_groups
from r1mega.parallel.layout import Layout
from r1mega.records import Batch, Sequence

if TYPE_CHECKING:
    from r1mega.learner.learner import Learner

MODEL = schema.Model(
    vocab_size=128,
    num_hidden_layers=4,
    n_routed_experts=16,
    initializer_range=0.08,
    max_position_embeddings=320,
    rope_scaling=schema.RopeScaling(factor=40.0, original_max_position_embeddings=8),
)
_DENSE: dict[str, Any] = {
    "vocab_size": 128,
    "num_hidden_layers": 4,
    "initializer_range": 0.08,
    "max_position_embeddings": 320,
}
MODELS = {
    "llama": schema.Model(
        architecture="llama",
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=16,
        attention_bias=True,
        rope_theta=50.0,
        rope_scaling=schema.RopeScaling(
            rope_type="llama3", factor=8.0, original_max_position_embeddings=64
        ),
        **_DENSE,
    ),
    "qwen2": schema.Model(
        architecture="qwen2", num_attention_heads=8, num_key_value_heads=4, **_DENSE
    ),
    "qwen2 tied": schema.Model(
        architecture="qwen2", num_key_value_heads=2, tie_word_embeddings=True, **_DENSE
    ),
    "deepseek_v3 without query lora": dataclasses.replace(MODEL, q_lora_rank=None),
    "deepseek_v3": MODEL,
}
SETTINGS = schema.Learner(
    precision="fp32", lr=1e-3, tokens_per_microbatch=64, logprob_chunk_tokens=16
)


def tiny_learner(
    *,
    model: schema.Model = MODEL,
    settings: schema.Learner = SETTINGS,
    temperature: float = 1.0,
    groups: Groups | None = None,
    mtp: MtpMode = "none",
    **axes: Any,
) -> "Learner":
    """The learner on this process's rank; ``axes`` are Layout's sizes but for the world's.

    A process opens its groups once: a second learner takes the ``groups`` of the first.
    """
    backend = open_backend("cpu")
    from r1mega.learner.learner import open_learner  # megatron.core, after the backend's shim

    if groups is None:
        layout = Layout(world=int(os.environ["WORLD_SIZE"]), **axes)
        groups = open_groups(layout, backend, timeout_s=120, seed=1)
    return open_learner(model, settings, groups, backend, temperature=temperature, seed=7, mtp=mtp)


def random_batch(
    *,
    num_sequences: int = 12,
    vocab_size: int = 128,
    lengths: tuple[int, int] = (8, 41),
    seed: int = 3,
) -> Batch:
    """Sequences of ``lengths[0]`` up to ``lengths[1]`` tokens with every column filled."""
    g = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, count: int) -> list[int]:
        return torch.randint(low, high, (count,), generator=g).tolist()

    def floats(count: int) -> list[float]:
        return torch.randn(count, generator=g).tolist()

    sequences = []
    for i in range(num_sequences):
        length = integers(*lengths, 1)[0]
        start = integers(1, min(6, length), 1)[0]
        n = length - start
        logprobs = [-4.8 + 0.1 * x for x in floats(n)]
        sequences.append(
            Sequence(
                uid=f"s{i}",
                token_ids=tuple(integers(0, vocab_size, length)),
                start=start,
                weight=1.0 / (num_sequences * n),
                advantage=floats(1)[0],
                sampler_logprobs=tuple(logprobs),
                policy_logprobs=tuple(
                    p + 0.05 * x for p, x in zip(logprobs, floats(n), strict=True)
                ),
                reference_logprobs=tuple(
                    p + 0.2 * x for p, x in zip(logprobs, floats(n), strict=True)
                ),
            )
        )
    return Batch(sequences=tuple(sequences))


def transformers_model(
    learner_model: schema.Model, folder: Path, extend: Callable[[Any], None] = lambda network: None
) -> Any:
    """transformers' own network with random weights, biases included, saved under ``folder``.

    ``extend`` adds modules to it first.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**hf_config(learner_model), attn_implementation="eager")
    network = AutoModelForCausalLM.from_config(config).eval().float()
    extend(network)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=g))
            else:
                parameter.normal_(0, 0.08, generator=g)
        for name, buffer in network.named_buffers():
            if "e_score_correction_bias" in name:
                buffer.copy_(0.05 * torch.randn(buffer.shape, generator=g))
    network.save_pretrained(folder)
    return network


def next_token_loss(network: Any, batch: Batch) -> torch.Tensor:
    """The weighted next-token loss of transformers' network."""
    loss = torch.zeros(())
    for s in batch.sequences:
        table = network(torch.tensor([s.token_ids])).logits[0].log_softmax(-1)
        targets = torch.tensor(s.token_ids[s.start :])
        rows = torch.arange(s.start - 1, len(s.token_ids) - 1)
        loss = loss - s.weight * table[rows, targets].sum()
    return loss


def transformers_gradients(
    network: Any, batch: Batch, loss: Callable[[Any, Batch], torch.Tensor] = next_token_loss
) -> dict[str, torch.Tensor]:
    """Gradients of ``loss``, under the names that save_pretrained writes."""
    network.zero_grad()
    loss(network, batch).backward()
    gradients = {}
    for name, parameter in network.named_parameters():
        stem = name.rpartition(".")[0]
        if name.endswith("experts.gate_up_proj"):  # one tensor for all experts, in memory only
            for expert, gradient in enumerate(parameter.grad):
                gate, up = gradient.chunk(2)
                gradients[f"{stem}.{expert}.gate_proj.weight"] = gate
                gradients[f"{stem}.{expert}.up_proj.weight"] = up
        elif name.endswith("experts.down_proj"):
            for expert, gradient in enumerate(parameter.grad):
                gradients[f"{stem}.{expert}.down_proj.weight"] = gradient
        else:
            gradients[name] = parameter.grad
    return gradients


def transformers_logprobs(network: Any, batch: Batch) -> list[list[float]]:
    """Of every sequence's targets."""
    rows = []
    for s in batch.sequences:
        with torch.no_grad():
            table = network(torch.tensor([s.token_ids])).logits[0].log_softmax(-1)
        rows.append(
            [table[s.start - 1 + i, t].item() for i, t in enumerate(s.token_ids[s.start :])]
        )
    return rows


def gradients(learner: "Learner") -> dict[str, list[float]]:
    """On rank 0, under Hugging Face names: of the next-token loss on ``random_batch()``.

    What is no parameter (the expert bias) has none and is left out. The weights stay as they were.
    """
    from r1mega.algorithms import losses
    from r1mega.learner.pipeline import run_pipeline

    for chunk in learner.chunks:
        chunk.zero_grad_buffer()
    batch = random_batch()
    run_pipeline(
        learner.chunks,
        learner.microbatches(batch, learner.pack(batch)),
        loss=losses.next_token_loss,
        temperature=1.0,
        chunk_tokens=16,
        auxiliary=learner.auxiliary,
    )
    held = learner.weights.copy_to_host()
    with torch.no_grad():
        for chunk in learner.chunks:
            for parameter in chunk.parameters():
                parameter.copy_(parameter.main_grad)
    found = weights(learner)
    learner.weights.swap(held)
    return {n: g for n, g in found.items() if not n.endswith("e_score_correction_bias")}


def weights(learner: "Learner") -> dict[str, list[float]]:
    """On rank 0 every Hugging Face tensor, flat, those of MTP layers too."""
    from r1mega.weights.collect import hf_tensors

    held = learner.weights
    return {
        name: tensor.flatten().tolist()
        for name, tensor in hf_tensors(held, held.holders, device=torch.device("cpu"))
        if tensor is not None
    }


def assert_close(mine: dict[str, list[float]], theirs: Mapping[str, Any]) -> None:
    """The same tensors, to 1e-5 of the largest entry of each."""
    assert mine.keys() == theirs.keys()
    for name, values in mine.items():
        expected = torch.as_tensor(theirs[name]).flatten()
        difference = (torch.tensor(values) - expected).abs().max()
        assert difference <= 1e-5 * expected.abs().max(), (name, difference)


def with_init(folder: Path) -> schema.Model:
    return dataclasses.replace(MODEL, init=str(folder))
