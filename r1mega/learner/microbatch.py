"""Packed sequences as the tensors of one forward pass.

Shapes: T packed tokens of this context-parallel rank (padding included), R target rows (all targets
of all sequences, in order), L those of them whose token this rank holds.
"""

from dataclasses import dataclass
from itertools import accumulate, zip_longest

import torch
from torch import Tensor

from r1mega.model.routing import FREE, Packing
from r1mega.model.targets import Targets
from r1mega.parallel.context import padded_lengths, zigzag_rows
from r1mega.records import Sequence


@dataclass(frozen=True, kw_only=True, slots=True)
class Microbatch:
    """What a forward pass reads and what a loss needs: columns over all target rows."""

    indices: tuple[int, ...]  # of the sequences in their batch
    tokens_T: Tensor
    positions_T: Tensor
    packed: Packing
    targets: Targets
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
    held_T = zigzag_rows(starts, cp, cp_rank)
    pairs = list(zip_longest(blocks, lengths, fillvalue=0))
    positions = torch.cat([torch.arange(block) for block, _ in pairs])
    real = torch.cat([torch.arange(block) < length for block, length in pairs])
    tokens = torch.zeros_like(positions)
    tokens[real] = torch.tensor([t for s in chosen for t in s.token_ids], dtype=torch.int64)
    ids = _packed_ids(expert_ids, starts)[held_T].to(device) if expert_ids else None
    counts = torch.tensor([s.num_targets for s in chosen], dtype=torch.int64)

    def per_row(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32).repeat_interleave(counts).to(device)

    def column(name: str) -> Tensor:
        return torch.tensor([v for s in chosen for v in getattr(s, name)], device=device)

    return Microbatch(
        indices=tuple(indices),
        tokens_T=tokens[held_T].to(device),
        positions_T=positions[held_T].to(device),
        packed=_packing(starts, ~real[held_T].to(device), ids),
        targets=_targets(chosen, starts, held_T, device),
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


def _targets(
    chosen: list[Sequence], starts: Tensor, held_T: Tensor, device: torch.device
) -> Targets:
    """Those whose token this rank holds."""
    firsts = starts.tolist()
    rows = [
        first + at - 1
        for s, first in zip(chosen, firsts, strict=False)
        for at in range(s.start, len(s.token_ids))
    ]
    ids = [token for s in chosen for token in s.token_ids[s.start :]]
    local = torch.full((firsts[-1],), -1)
    local[held_T] = torch.arange(len(held_T))
    local_R = local[torch.tensor(rows, dtype=torch.int64)]
    places_L = (local_R >= 0).nonzero()[:, 0]
    return Targets(
        rows_L=local_R[places_L].to(device),
        ids_L=torch.tensor(ids, dtype=torch.int64)[places_L].to(device),
        places_L=places_L.to(device),
        num_rows=len(rows),
    )


def _packing(starts: Tensor, padding_T: Tensor, expert_ids_TMK: Tensor | None) -> Packing:
    """Padding behind a sequence counts as part of it: no token sees what comes after. So lengths
    and padded lengths are the same, and TransformerEngine takes its fast path without gaps."""
    device, longest = padding_T.device, int(starts.diff().max())
    cu_seqlens = starts.to(device, torch.int32)
    return Packing(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=cu_seqlens,
        cu_seqlens_kv_padded=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        padding_T=padding_T,
        expert_ids_TMK=expert_ids_TMK,
        rerouted=torch.zeros((), dtype=torch.int64, device=device),
    )


def _packed_ids(expert_ids: list[Tensor], starts: Tensor) -> Tensor:
    """int16, the tokens of all cp ranks. A sequence's last token predicts nothing: it has none."""
    ids = torch.full((int(starts[-1]), *expert_ids[0].shape[1:]), FREE, dtype=torch.int16)
    for part, start in zip(expert_ids, starts.tolist(), strict=False):
        ids[start : start + len(part)] = part
    return ids
