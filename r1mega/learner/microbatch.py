"""Packed sequences as the tensors of one forward pass.

Shapes: T packed tokens (padding included), R target rows (all targets of all sequences, in order).
"""

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from r1mega.records import Sequence


@dataclass(frozen=True, kw_only=True, slots=True)
class Microbatch:
    """Row r predicts ``targets_R[r]`` from packed position ``rows_R[r]``; columns follow the
    rows."""

    indices: tuple[int, ...]  # of the sequences in their batch
    tokens_T: Tensor
    positions_T: Tensor
    packed: PackedSeqParams
    num_padding: int
    rows_R: Tensor
    targets_R: Tensor
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
    sequences: tuple[Sequence, ...], indices: list[int], *, multiple: int, device: torch.device
) -> Microbatch:
    """Concatenate ``sequences[i] for i in indices``; T is rounded up to ``multiple``.

    An empty list gives a microbatch of padding with no targets: every rank must take part in every
    pass of the pipeline.
    """
    chosen = [sequences[i] for i in indices]
    lengths = [len(s.token_ids) for s in chosen]
    num_padding = -sum(lengths) % multiple if lengths else multiple
    blocks = [*lengths, num_padding] if num_padding else lengths
    tokens = [t for s in chosen for t in s.token_ids] + [0] * num_padding
    starts = torch.tensor([0, *blocks], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    rows: list[int] = []
    for s, offset in zip(chosen, starts.tolist(), strict=False):
        rows += range(offset + s.start - 1, offset + len(s.token_ids) - 1)
    counts = torch.tensor([s.num_targets for s in chosen], dtype=torch.int64)

    def per_row(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32).repeat_interleave(counts).to(device)

    def column(name: str) -> Tensor:
        return torch.tensor([v for s in chosen for v in getattr(s, name)], device=device)

    cu_seqlens = starts.to(device)
    return Microbatch(
        indices=tuple(indices),
        tokens_T=torch.tensor(tokens, device=device),
        positions_T=torch.cat([torch.arange(n) for n in blocks]).to(device),
        packed=PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=max(blocks),
            max_seqlen_kv=max(blocks),
        ),
        num_padding=num_padding,
        rows_R=torch.tensor(rows, dtype=torch.int64, device=device),
        targets_R=torch.tensor(
            [t for s in chosen for t in s.token_ids[s.start :]], dtype=torch.int64, device=device
        ),
        sequence_R=torch.arange(len(chosen)).repeat_interleave(counts).to(device),
        weight_R=per_row([s.weight for s in chosen]),
        advantage_R=per_row([s.advantage for s in chosen]),
        sampler_logprobs_R=column("sampler_logprobs"),
        policy_logprobs_R=column("policy_logprobs"),
        reference_logprobs_R=column("reference_logprobs"),
    )
