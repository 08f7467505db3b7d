"""This rank's part of the policy network: GPTModel chunks that answer log-probs instead of logits.

The network knows nothing of losses. On the last stage ``forward`` returns log-probs and entropies
of the target tokens; output weight and log-prob are fused in chunks, so full logits never exist.
Shapes: T packed tokens, R target rows, H hidden, E experts.
"""

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from r1mega.config import network, schema
from r1mega.model import local_spec
from r1mega.model.routing import Packing, guide_routers, moe_layers
from r1mega.model.transformer_config import BuildOptions, transformer_config
from r1mega.parallel.context import gather_rows
from r1mega.parallel.groups import Groups
from r1mega.parallel.logprobs import vocab_parallel_logprobs


class PolicyModel(GPTModel):
    """One pipeline chunk of the policy."""

    def forward(
        self,
        *,
        tokens_T: Tensor,
        positions_T: Tensor,
        packed: Packing,
        rows_L: Tensor,
        targets_L: Tensor,
        places_L: Tensor,
        num_rows: int,
        temperature: float,
        chunk_tokens: int,
    ) -> Tensor:
        """Hidden states [T, 1, H]; on the last stage log-probs and entropies, stacked [2, R].

        ``rows_L`` are the tokens of this context-parallel rank whose next one is ``targets_L``, a
        part of the R targets of the microbatch: their ``places_L`` among ``num_rows``.
        """
        hidden = super().forward(
            input_ids=tokens_T[None],
            position_ids=positions_T[None],
            attention_mask=None,
            packed_seq_params=packed,
        )
        if not self.post_process:
            return hidden
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True, group=self.pg_collection.tp
            )
        logprobs_L, entropies_L = vocab_parallel_logprobs(
            hidden[:, 0].index_select(0, rows_L),
            self._head(),
            targets_L,
            temperature=temperature,
            chunk_tokens=chunk_tokens,
            group=self.pg_collection.tp,
        )
        rows_2L = torch.stack([logprobs_L, entropies_L])
        return gather_rows(rows_2L, places_L, num_rows, self.pg_collection.cp)

    def _head(self) -> Tensor:
        """This rank's rows of the output weight."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def _postprocess(self, hidden_states: Tensor, **_: Any) -> Tensor:
        """Upstream makes logits here; we hand out the hidden states."""
        return hidden_states


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
        policy = PolicyModel(
            config,
            _spec(config, model, options, vp_stage),
            vocab_size=model.vocab_size,
            max_sequence_length=model.max_position_embeddings,
            pre_process=groups.place["pp"] == 0 and chunk == 0,
            post_process=groups.is_last_stage and chunk == num_chunks - 1,
            position_embedding_type="rope",
            rotary_base=model.rope_theta,
            share_embeddings_and_output_weights=model.tie_word_embeddings,
            parallel_output=True,
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


def _spec(
    config: TransformerConfig, model: schema.Model, options: BuildOptions, vp_stage: int | None
) -> Any:
    if options.layer_spec == "local":
        has_bias = network.has_attention_output_bias(model)
        return local_spec.decoder_spec(config, vp_stage, attention_output_bias=has_bias)
    return get_gpt_decoder_block_spec(
        config, use_transformer_engine=True, normalization="RMSNorm", vp_stage=vp_stage
    )
