"""Packed sequences as the tensors of one forward pass.

Shapes: T packed tokens of this context-parallel rank (padding included), R target rows (all targets
of all sequences, in order), L those of them whose token this rank holds: all of R without cp.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from r1mega.model.routing import FREE, Packing
from r1mega.parallel.context import padded_lengths, zigzag_rows
from r1mega.records import Sequence


@dataclass(frozen=True, kw_only=True, slots=True)
class Microbatch:
    """Row l predicts ``targets_L[l]`` from the token at ``rows_L[l]`` and is number ``places_L[l]``
    of the R target rows, which the columns follow."""

    indices: tuple[int, ...]  # of the sequences in their batch
    tokens_T: Tensor
    positions_T: Tensor
    packed: Packing
    rows_L: Tensor
    targets_L: Tensor
    places_L: Tensor
    sequence_R: Tensor  # which sequence of this microbatch a row belongs to
    weight_R: Tensor
    advantage_R: Tensor
    sampler_logprobs_R: Tensor  # empty columns stay empty
    policy_logprobs_R: Tensor
    reference_logprobs_R: Tensor

    @property
    def num_sequences(self) -> int:
        return len(self.indices)


def make_microbatch(
    sequences: tuple[Sequence, ...],
    indices: list[int],
    *,
    multiple: int,
    device: torch.device,
    cp: int = 1,
    cp_rank: int = 0,
    least_tokens: int = 0,
    expert_ids: list[Tensor] | None = None,
) -> Microbatch:
    """Concatenate ``sequences[i] for i in indices`` and take the part of ``cp_rank``.

    T is a multiple of ``multiple``, and over all ``cp`` ranks at least ``least_tokens``.
    ``expert_ids``: of each sequence [tokens - 1, MoE layers of this stage, topk], to be replayed.

    An empty list gives a microbatch of padding with no targets: every rank must take part in every
    pass of the pipeline.
    """
    chosen = [sequences[i] for i in indices]
    lengths = [len(s.token_ids) for s in chosen]
    blocks = padded_lengths(lengths, cp=cp, multiple=multiple, least=least_tokens)
    starts = torch.tensor([0, *accumulate(blocks)])
    rows: list[int] = []
    targets: list[int] = []
    tokens = torch.zeros(sum(blocks), dtype=torch.int64)
    padding = torch.ones(sum(blocks), dtype=torch.bool)
    for s, start in zip(chosen, starts.tolist(), strict=False):
        end = start + len(s.token_ids)
        tokens[start:end] = torch.tensor(s.token_ids)
        padding[start:end] = False
        rows += range(start + s.start - 1, end - 1)
        targets += s.token_ids[s.start :]
    counts = torch.tensor([s.num_targets for s in chosen], dtype=torch.int64)
    positions = torch.arange(len(tokens)) - starts[:-1].repeat_interleave(starts.diff())
    held_T = zigzag_rows(starts, cp, cp_rank)
    places_L, rows_L = _held(torch.tensor(rows, dtype=torch.int64), held_T, len(tokens))

    def per_row(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32).repeat_interleave(counts).to(device)

    def column(name: str) -> Tensor:
        return torch.tensor([v for s in chosen for v in getattr(s, name)], device=device)

    # Padding behind a sequence counts as part of it: no token sees what comes after. So lengths and
    # padded lengths are the same, and TransformerEngine takes its fast path without gaps.
    cu_seqlens = starts.to(torch.int32).to(device)
    return Microbatch(
        indices=tuple(indices),
        tokens_T=tokens[held_T].to(device),
        positions_T=positions[held_T].to(device),
        packed=Packing(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            cu_seqlens_q_padded=cu_seqlens,
            cu_seqlens_kv_padded=cu_seqlens,
            max_seqlen_q=max(blocks),
            max_seqlen_kv=max(blocks),
            padding_T=padding[held_T].to(device),
            expert_ids_TMK=_packed_ids(expert_ids, starts, held_T, device) if expert_ids else None,
            rerouted=torch.zeros((), dtype=torch.int64, device=device),
        ),
        rows_L=rows_L.to(device),
        targets_L=torch.tensor(targets, dtype=torch.int64)[places_L].to(device),
        places_L=places_L.to(device),
        sequence_R=torch.arange(len(chosen)).repeat_interleave(counts).to(device),
        weight_R=per_row([s.weight for s in chosen]),
        advantage_R=per_row([s.advantage for s in chosen]),
        sampler_logprobs_R=column("sampler_logprobs"),
        policy_logprobs_R=column("policy_logprobs"),
        reference_logprobs_R=column("reference_logprobs"),
    )


def common_tokens(
    sequences: tuple[Sequence, ...], ranks: list[list[list[int]]], *, cp: int, multiple: int
) -> list[int]:
    """Tokens of every microbatch on the rank of ``ranks`` where it is longest.

    The allgather dispatcher stacks the tokens of all ranks that share experts, so each pads to it.
    """
    return [
        max(
            sum(padded_lengths([len(sequences[i].token_ids) for i in p], cp=cp, multiple=multiple))
            for p in parts
        )
        for parts in zip(*ranks, strict=True)
    ]


def _held(rows_R: Tensor, held_T: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Which of the target rows this rank holds (``places_L``), and at which of its tokens."""
    local = torch.full((num_tokens,), -1)
    local[held_T] = torch.arange(len(held_T))
    local_R = local[rows_R]
    places_L = (local_R >= 0).nonzero()[:, 0]
    return places_L, local_R[places_L]


def _packed_ids(
    expert_ids: list[Tensor], starts: Tensor, held_T: Tensor, device: torch.device
) -> Tensor:
    """[T, M, K] int16. The last token of a sequence predicts nothing: none were recorded for it."""
    ids_TMK = torch.full((int(starts[-1]), *expert_ids[0].shape[1:]), FREE, dtype=torch.int16)
    for ids, start in zip(expert_ids, starts.tolist(), strict=False):
        ids_TMK[start : start + len(ids)] = ids
    return ids_TMK[held_T].to(device)
