"""The learner: one model replica per data-parallel rank, updated by any loss under any layout.

Every rank holds the same batch records; each packs its own part. Results do not depend on the
layout or on how sequences are packed, because the loss is a sum of globally weighted target tokens.
"""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from r1mega.config import schema
from r1mega.config.derived import MtpMode
from r1mega.config.flops import crossover_tokens
from r1mega.learner.metrics import reduce_outputs
from r1mega.learner.microbatch import Microbatch, common_tokens, make_microbatch
from r1mega.learner.mtp import MtpLoss
from r1mega.learner.optimizer import apply_gradients, finish_gather, open_optimizer, wrap_chunks
from r1mega.learner.packing import Partition, pack
from r1mega.learner.pipeline import Auxiliary, Loss, run_pipeline
from r1mega.learner.routed_experts import fetch_expert_ids, rerouted_share
from r1mega.model.build import build_model
from r1mega.model.transformer_config import BuildOptions
from r1mega.parallel.backend import Backend
from r1mega.parallel.groups import Groups
from r1mega.records import Batch
from r1mega.weights.collect import hf_tensors
from r1mega.weights.local import LocalWeights, initialize, local_weights
from r1mega.weights.names import Spec, hf_shapes


@dataclass(frozen=True, kw_only=True, slots=True)
class Learner:
    """Open it with ``open_learner``; all methods are collective: every rank calls them alike."""

    groups: Groups
    backend: Backend
    settings: schema.Learner
    temperature: float  # log-probs are of logits / temperature, as the sampler's are
    weights: LocalWeights
    policy_names: tuple[str, ...]  # of its Hugging Face tensors: 45,395 at 671B, listed once
    chunks: list[DistributedDataParallel]
    optimizer: Any
    auxiliary: Auxiliary | None  # of the MTP layers

    def update(self, batch: Batch, loss: Loss, *, lr: float) -> dict[str, float]:
        """One optimizer step on ``batch``: ``learner/*`` metrics and the loss's own, reduced.

        Raises RuntimeError on every rank when the loss or the gradient norm is not finite.
        """
        started = time.perf_counter()
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        partition = self.pack(batch)
        microbatches = self.microbatches(batch, partition)
        outputs = self._run(microbatches, loss)
        rerouted = rerouted_share(batch, microbatches, self.weights.model)
        metrics = reduce_outputs(outputs, rerouted, self.groups, self.backend.device)
        _check_finite("loss", metrics["loss"])  # before any weight changes
        _check_finite("loss of the MTP layers", metrics.get("mtp/loss", 0.0))
        grad_norm = apply_gradients(self.optimizer, lr=lr, weight_decay=self.settings.weight_decay)
        _check_finite("gradient norm", grad_norm)
        seconds = time.perf_counter() - started
        return metrics | {
            "learner/grad_norm": grad_norm,
            "learner/lr": lr,
            "learner/microbatches": float(len(partition.parts[0])),
            "learner/balance": partition.balance,
            "learner/tokens_per_s": sum(len(s.token_ids) for s in batch.sequences) / seconds,
        }

    @torch.no_grad()
    def logprobs(self, batch: Batch) -> list[tuple[float, ...]]:
        """Log-probs of every sequence's targets under the present weights, on every rank."""
        for chunk in self.chunks:
            chunk.eval()
        microbatches = self.microbatches(batch, self.pack(batch))
        outputs = self._run(microbatches, None)
        counts = [s.num_targets for s in batch.sequences]
        table = torch.zeros(sum(counts), device=self.backend.device)
        if self.groups.reports_losses:
            places = table.split(counts)
            for microbatch, logprobs_R in zip(microbatches, outputs, strict=True):
                _scatter(places, counts, microbatch, logprobs_R)
        # Every target was filled by exactly one rank: adding zeros is exact.
        dist.all_reduce(table, group=self.groups.world)
        return [tuple(part.tolist()) for part in table.split(counts)]

    def reference_logprobs(self, batch: Batch, reference: list[Tensor]) -> list[tuple[float, ...]]:
        """As ``logprobs`` under the weights of ``reference``, a host copy that is swapped in.

        It routes by itself: recorded experts are the policy's choice.
        """
        self.weights.swap(reference)
        try:
            return self.logprobs(replace(batch, replays_routing=False))
        finally:
            self.weights.swap(reference)

    def hf_tensors(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor | None]]:
        """The policy as Hugging Face tensors on rank 0; every rank must iterate to the end.

        Those in ``names``, or all but of its MTP layers: engines sample from the trunk.
        """
        wanted = self.policy_names if names is None else names
        return hf_tensors(self.weights, wanted, device=self.backend.device)

    def pack(self, batch: Batch) -> Partition:
        """Which sequences go to which rank and microbatch: the same answer on every rank."""
        layout = self.groups.layout
        return pack(
            [len(s.token_ids) for s in batch.sequences],
            dp=layout.dp,
            pp=layout.pp,
            vpp=layout.vpp,
            tokens_per_microbatch=self.settings.tokens_per_microbatch,
            crossover_tokens=crossover_tokens(self.weights.model),
        )

    def microbatches(self, batch: Batch, partition: Partition) -> list[Microbatch]:
        """This rank's part of the batch."""
        layout, place = self.groups.layout, self.groups.place
        # Sequence parallelism cuts T over tp; fp8 GEMMs want 16 rows of it at least.
        multiple = layout.tp * (1 if self.settings.fp8 == "none" else 16)
        parts = partition.parts[place["dp"]]
        least = [0] * len(parts)
        if self.settings.dispatcher == "allgather":
            peers = [partition.parts[dp_rank] for dp_rank in layout.expert_peers(self.groups.rank)]
            least = common_tokens(batch.sequences, peers, cp=layout.cp, multiple=multiple)
        ids = fetch_expert_ids(
            batch,
            partition,
            model=self.weights.model,
            groups=self.groups,
            device=self.backend.device,
        )
        return [
            make_microbatch(
                batch.sequences,
                part,
                multiple=multiple,
                device=self.backend.device,
                cp=layout.cp,
                cp_rank=place["cp"],
                least_tokens=tokens,
                expert_ids=expert_ids,
            )
            for part, tokens, expert_ids in zip(parts, least, ids, strict=True)
        ]

    def _run(self, microbatches: list[Microbatch], loss: Loss | None) -> list[Any]:
        return run_pipeline(
            self.chunks,
            microbatches,
            loss=loss,
            temperature=self.temperature,
            chunk_tokens=self.settings.logprob_chunk_tokens,
            auxiliary=self.auxiliary,
        )


def open_learner(
    model: schema.Model,
    settings: schema.Learner,
    groups: Groups,
    backend: Backend,
    *,
    temperature: float,
    seed: int,
    mtp: MtpMode = "none",
) -> Learner:
    """Build, fill (``model.init``) and wrap this rank's part of the policy and its optimizer."""
    options = BuildOptions(
        precision=settings.precision,
        layer_spec=settings.layer_spec,
        recompute=settings.recompute,
        recompute_modules=settings.recompute_modules,
        dispatcher=settings.dispatcher,
        grouped_gemm=settings.grouped_gemm,
        fp8=settings.fp8,
        expert_bias_update_rate=settings.expert_bias_update_rate,
        mtp=mtp,
        megatron=settings.megatron,
    )
    config, raw_chunks = build_model(model, groups, options, device=backend.device)
    spec = Spec(
        fused_norms=settings.layer_spec == "transformer_engine",
        grouped_experts=settings.grouped_gemm,
        mtp=mtp != "none",
    )
    weights = local_weights(model, groups.layout, groups.rank, raw_chunks, spec)
    initialize(weights, model.init, seed=seed)
    chunks = wrap_chunks(config, raw_chunks, settings)
    optimizer = open_optimizer(config, chunks, settings)
    if settings.overlap_param_gather:
        weights = replace(weights, settle=partial(finish_gather, chunks))
    return Learner(
        groups=groups,
        backend=backend,
        settings=settings,
        temperature=temperature,
        weights=weights,
        policy_names=tuple(hf_shapes(model)),
        chunks=chunks,
        optimizer=optimizer,
        auxiliary=MtpLoss(weight=settings.mtp_loss_weight) if spec.mtp else None,
    )


def _check_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise RuntimeError(
            f"the {name} is {value}: the weights this run started from are broken, or "
            "learner.lr is too high; what was saved before it stands"
        )


def _scatter(
    places: tuple[Tensor, ...], counts: list[int], microbatch: Microbatch, logprobs_R: Tensor
) -> None:
    parts = logprobs_R.split([counts[i] for i in microbatch.indices])
    for index, part in zip(microbatch.indices, parts, strict=True):
        places[index].copy_(part)
