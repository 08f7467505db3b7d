"""This rank's part of the policy network: GPTModel chunks that answer log-probs instead of logits.

The network knows nothing of losses. On the last stage ``forward`` returns log-probs and entropies
of the target tokens; output weight and log-prob are fused in chunks, so full logits never exist.
Shapes: T packed tokens, R target rows, H hidden, E experts.
"""

import copy
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from r1mega.config import network, schema
from r1mega.model import local_spec
from r1mega.model.routing import Packing, guide_routers, moe_layers
from r1mega.model.targets import Targets
from r1mega.model.transformer_config import BuildOptions, transformer_config
from r1mega.parallel.context import gather_rows
from r1mega.parallel.groups import Groups
from r1mega.parallel.logprobs import vocab_parallel_logprobs


class PolicyModel(GPTModel):
    """One pipeline chunk of the policy, on the last stage with its MTP layers, if there are any."""

    def __init__(self, *args: Any, detaches_mtp: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.detaches_mtp = detaches_mtp
        if self.post_process:
            # Called rather than only read, because hooks of the output layer wait for its weight
            # when Megatron gathers weights while the forward pass goes on (overlap_param_gather).
            self.output_layer.forward = vocab_parallel_logprobs
        if self.mtp_process:
            self._set_up_mtp()

    def _set_up_mtp(self) -> None:
        for layer in self.mtp.layers:
            # megatron-core 0.16.1 cannot recompute it when packed; the other layers still are.
            layer.config = copy.copy(self.config)
            layer.config.recompute_granularity = None
        for parameter in self.mtp.parameters() if self.detaches_mtp else ():
            # Megatron's word for "not in the gradient norm": clipping must not depend on it.
            parameter.shared = True

    def forward(
        self,
        *,
        tokens_T: Tensor,
        positions_T: Tensor,
        packed: Packing,
        targets: Targets,
        temperature: float,
        chunk_tokens: int,
    ) -> Tensor:
        """Hidden states [T, 1, H]; on the last stage log-probs and entropies, stacked [2, R].

        In passes with gradient a further row follows for each of D MTP layers, [2 + D, R]: the d-th
        predicts the same targets from d tokens further back; 0 where a sequence has none.
        """
        output = super().forward(
            input_ids=tokens_T[None],
            position_ids=positions_T[None],
            attention_mask=None,
            packed_seq_params=packed,
        )
        if not self.post_process:
            return output
        head = partial(
            self._head, ids_L=targets.ids_L, temperature=temperature, chunk_tokens=chunk_tokens
        )
        trunk, *ahead = output
        rows_L = targets.rows_L
        rows = list(head(trunk, rows_L))
        for depth, hidden in enumerate(ahead, start=1):
            logprobs_L, _ = head(hidden, (rows_L - depth).clamp(min=0), detach=self.detaches_mtp)
            rows.append(logprobs_L.masked_fill(positions_T[rows_L] < depth, 0.0))
        return gather_rows(
            torch.stack(rows), targets.places_L, targets.num_rows, self.pg_collection.cp
        )

    def _head(
        self, hidden: Tensor, rows_L: Tensor, *, ids_L: Tensor, detach: bool = False, **how: Any
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [L] from the hidden states at ``rows_L``."""
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True, group=self.pg_collection.tp
            )
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        logprobs_and_entropies: tuple[Tensor, Tensor] = self.output_layer(
            hidden[:, 0].index_select(0, rows_L),
            weight.detach() if detach else weight,
            ids_L,
            group=self.pg_collection.tp,
            **how,
        )
        return logprobs_and_entropies

    def _postprocess(
        self,
        hidden_states: Tensor,
        input_ids: Tensor,
        position_ids: Tensor,
        *,
        packed_seq_params: Packing,
        **_: Any,
    ) -> Tensor | list[Tensor]:
        """Upstream makes logits here; we hand out the hidden states, of MTP layers too (DeepSeek-V3
        report, arXiv 2412.19437, eq. 21-22)."""
        if not self.post_process:
            return hidden_states
        if not self.mtp_process or not torch.is_grad_enabled():
            return [hidden_states]
        trunk, embedding = hidden_states, self.embedding
        if self.detaches_mtp:
            trunk = hidden_states.detach()

            def embedding(**tokens: Tensor) -> Tensor:
                return self.embedding(**tokens).detach()

        stacked = self.mtp(
            input_ids=input_ids,
            position_ids=position_ids,
            hidden_states=trunk,
            attention_mask=None,
            packed_seq_params=packed_seq_params,
            embedding=embedding,
        )
        return [hidden_states, *stacked.chunk(1 + len(self.mtp.layers))[1:]]


def build_model(
    model: schema.Model, groups: Groups, options: BuildOptions, *, device: torch.device
) -> tuple[TransformerConfig, list[torch.nn.Module]]:
    """Megatron's config and this rank's chunks (one per virtual stage).

    Their weights are Megatron's own draw, which depends on the layout: fill them from
    ``r1mega.weights``. (Initialization stays on because it also marks what is cut over tp, which
    the gradient norm reads.)
    """
    layout = groups.layout
    config = transformer_config(model, layout, options)
    # Frees a stage's output as soon as its send has begun. NCCL orders that on a stream; gloo reads
    # the memory later, and the interleaved schedule then trained on garbage in one step of ten.
    config.deallocate_pipeline_outputs = device.type == "cuda"
    layers = moe_layers(model, layout, groups.place["pp"])
    chunks: list[torch.nn.Module] = []
    num_chunks = layout.vpp or 1
    for chunk in range(num_chunks):
        vp_stage = chunk if layout.vpp else None
        decoder, mtp = _specs(config, model, options, vp_stage)
        policy = PolicyModel(
            config,
            decoder,
            vocab_size=model.vocab_size,
            max_sequence_length=model.max_position_embeddings,
            pre_process=groups.place["pp"] == 0 and chunk == 0,
            post_process=groups.is_last_stage and chunk == num_chunks - 1,
            position_embedding_type="rope",
            rotary_base=model.rope_theta,
            share_embeddings_and_output_weights=model.tie_word_embeddings,
            parallel_output=True,
            mtp_block_spec=mtp,
            detaches_mtp=options.mtp == "detached",
            vp_stage=vp_stage,
        ).to(device)
        if network.is_dense(model) and model.rope_scaling is not None:
            _scale_rope(policy, model.rope_scaling)
        _mark_experts(policy)
        guide_routers(policy, layers, groups.tp)
        chunks.append(_in_bf16(config, policy) if options.precision == "bf16" else policy)
    return config, chunks


def _scale_rope(policy: PolicyModel, scaling: schema.RopeScaling) -> None:
    """Llama 3's frequencies; the argument of GPTModel fixes all of them but the factor."""
    rope = policy.rotary_pos_emb
    rope.inv_freq = rope._apply_scaling(
        rope.inv_freq,
        factor=scaling.factor,
        low_freq_factor=scaling.low_freq_factor,
        high_freq_factor=scaling.high_freq_factor,
        original_max_position_embeddings=scaling.original_max_position_embeddings,
    )


def _mark_experts(policy: PolicyModel) -> None:
    """Experts reduce their gradients over edp, always.

    megatron-core 0.16.1 marks them so only when ep > 1; with ep=1 and etp < tp it would reduce over
    dp alone and every tensor-parallel rank would train experts of its own, silently.
    """
    for name, parameter in policy.named_parameters():
        if ".mlp.experts." in name:
            parameter.allreduce = False


def _in_bf16(config: TransformerConfig, policy: PolicyModel) -> torch.nn.Module:
    """bf16 weights, but the expert bias stays fp32: rounding it changes the routing."""
    wrapped = Float16Module(config, policy)
    for module in policy.modules():
        if getattr(module, "expert_bias", None) is not None:
            module._maintain_float32_expert_bias()
    return wrapped


def _specs(
    config: TransformerConfig, model: schema.Model, options: BuildOptions, vp_stage: int | None
) -> tuple[Any, Any]:
    """Of the decoder's layers, and of the MTP layers where there are any."""
    if options.layer_spec == "local":
        has_bias = network.has_attention_output_bias(model)
        decoder = local_spec.decoder_spec(config, vp_stage, attention_output_bias=has_bias)
        return decoder, local_spec.mtp_spec(config, decoder, vp_stage)
    decoder = get_gpt_decoder_block_spec(
        config, use_transformer_engine=True, normalization="RMSNorm", vp_stage=vp_stage
    )
    return decoder, get_gpt_mtp_block_spec(
        config, decoder, use_transformer_engine=True, vp_stage=vp_stage
    )
