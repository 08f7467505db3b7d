"""Each constraint has one sentence with the values, and all violations come at once."""

import pytest

from r1mega.config import ConfigError, load

CUDA = ["cluster.backend=cuda", "rollout.engine=sglang"]


def _violations(*layers: str) -> list[str]:
    """The numbered lines of the error; none when the layers are valid."""
    try:
        load(layers)
    except ConfigError as error:
        head, *lines = str(error).splitlines()
        assert head.startswith(f"{len(lines)} problem")
        assert [line.split(".")[0].strip() for line in lines] == [
            str(number) for number in range(1, len(lines) + 1)
        ]
        return [line.split(". ", 1)[1] for line in lines]
    return []


# Layers -> the start of the only violation.
SINGLE = {
    "cluster.learner_processes_per_node=3 parallel.pp=2": (
        "tp=1 * pp=2 * cp=1 = 2 must divide the learner's 3 ranks"
    ),
    "model.num_key_value_heads=2": (
        "model.num_key_value_heads=2: architecture deepseek_v3 does not have this; unset it"
    ),
    "LLAMA model.kv_lora_rank=32": (
        "model.kv_lora_rank=32: architecture llama does not have this; unset it (two model layers"
    ),
    "LLAMA model.kv_lora_rank=32 model.n_group=2": (
        "model.kv_lora_rank=32, model.n_group=2: architecture llama does not have this; unset it"
    ),
    "model.architecture=qwen2 model.attention_bias=true": (
        "model.attention_bias=True: architecture qwen2 does not have this; unset it"
    ),
    "LLAMA model.rope_scaling.factor=8": (
        "model.rope_scaling.rope_type=yarn is not implemented for llama, only llama3; unset"
    ),
    "LLAMA model.rope_scaling.rope_type=llama3 model.rope_scaling.beta_fast=8": (
        "model.rope_scaling.beta_fast=8: llama3 has no such key; unset it"
    ),
    "LLAMA model.rope_scaling.rope_type=llama3 model.rope_scaling.high_freq_factor=1": (
        "model.rope_scaling.high_freq_factor=1 must be above low_freq_factor=1"
    ),
    "LLAMA model.num_attention_heads=6": "model.num_attention_heads=6 must divide hidden_size=64",
    "LLAMA model.num_key_value_heads=3": (
        "model.num_key_value_heads=3 must divide num_attention_heads=4"
    ),
    "LLAMA model.head_dim=7": "a head of 7 channels must be even",
    "LLAMA TP2 model.num_attention_heads=18 model.num_key_value_heads=3 model.head_dim=4": (
        "tp=2 must divide model.num_key_value_heads=3, or be a multiple of it that divides num_atte"
    ),
    "LLAMA TP2 parallel.ep=2": "parallel.ep=2 has no meaning for llama; unset it",
    "LLAMA learner.mtp_loss_weight=0.3": "learner.mtp_loss_weight=0.3 has no meaning for llama",
    "MTP model.tie_word_embeddings=true": "learner.mtp_loss_weight=0.3 needs model.tie_word_embedd",
    "MTP parallel.cp=2 cluster.learner_processes_per_node=2": (
        "learner.mtp_loss_weight=0.3 needs parallel.cp=1, got 2"
    ),
    "learner.mtp_loss_weight=0.3": (
        "learner.mtp_loss_weight=0.3 needs MTP layers, but model.num_nextn_predict_layers=0"
    ),
    "parallel.ep=2": "ep=2 * etp=1 = 2 must divide the 1 ranks of a pipeline stage",
    "cluster.learner_processes_per_node=4 parallel.etp=2 parallel.ep=4": (
        "ep=4 * etp=2 = 8 must divide the 4 ranks of a pipeline stage (tp=1 * cp=1 * dp=4)"
    ),
    "cluster.learner_processes_per_node=8 algorithm.prompts_per_step=2 algorithm.group_size=2": (
        "a step of 4 sequences leaves some of dp=8 replicas without one"
    ),
    "stage.kind=sft cluster.learner_processes_per_node=8 algorithm.sequences_per_step=4": (
        "a step of 4 sequences leaves some of dp=8 replicas without one"
    ),
    "parallel.layers_in_last_stage=4": (
        "layers_in_first_stage, layers_in_last_stage and vpp need pp of at least 2, got pp=1"
    ),
    "parallel.vpp=2": "layers_in_first_stage, layers_in_last_stage and vpp need pp of at least 2",
    "PP4 model.num_hidden_layers=6": (
        "6 layers do not spread over pp=4 stages: 6 layers remain for 4 stages of equal leng"
    ),
    "PP4 model.num_hidden_layers=9 parallel.layers_in_last_stage=1": (
        "9 layers do not spread over pp=4 stages: 8 layers remain for 3 stages of equal length "
        "beside the 1 of the outer ones; change"
    ),
    "PP4 model.num_hidden_layers=5 parallel.layers_in_first_stage=5": (
        "5 layers do not spread over pp=4 stages: 0 layers remain for 3"
    ),
    "PP4 model.num_hidden_layers=8 parallel.vpp=3": (
        "vpp=3 must divide the 2 layers of a pipeline stage"
    ),
    "PP4 parallel.vpp=2 parallel.layers_in_first_stage=1": (
        "vpp=2 must divide the 1 layers of a pipeline stage"
    ),
    "parallel.pp=2 cluster.learner_processes_per_node=2 parallel.vpp=2 model.num_hidden_layers=6 "
    "parallel.layers_in_first_stage=2 parallel.layers_in_last_stage=4": (
        "vpp=2 with both layers_in_first_stage=2 and layers_in_last_stage=4 at pp=2 makes megatron"
    ),
    "TP2 model.num_attention_heads=5": "tp=2 must divide model.num_attention_heads=5",
    "TP2 model.vocab_size=65": "tp=2 must divide model.vocab_size=65",
    "TP2 model.intermediate_size=129": "tp=2 must divide model.intermediate_size=129",
    "TP2 model.moe_intermediate_size=33": (
        "tp=2 must divide model.n_shared_experts * moe_intermediate_size=33"
    ),
    "TP2 parallel.etp=2 model.moe_intermediate_size=33 model.n_shared_experts=2": (
        "etp=2 must divide model.moe_intermediate_size=33"
    ),
    "model.first_k_dense_replace=5": "model.first_k_dense_replace=5 exceeds num_hidden_layers=4",
    "cluster.learner_processes_per_node=3 parallel.ep=3": (
        "ep=3 must divide model.n_routed_experts=8"
    ),
    "model.n_group=3": "model.n_group=3 must divide n_routed_experts=8",
    "model.n_group=1 model.topk_group=1 model.num_experts_per_tok=9": (
        "model.num_experts_per_tok=9 exceeds the 8 experts of topk_group=1 groups of 8"
    ),
    "model.n_group=1 model.topk_group=1 model.num_experts_per_tok=1": (
        "model.num_experts_per_tok=1: megatron-core does not normalize the score of a single expert"
    ),
    "model.topk_group=2 model.num_experts_per_tok=2": (
        "model.topk_group=2 must be half of num_experts_per_tok=2"
    ),
    "model.topk_group=5 model.num_experts_per_tok=10": "model.topk_group=5 exceeds n_group=4",
    "model.qk_rope_head_dim=7": "model.qk_rope_head_dim=7 must be even",
    "model.eos_token_id=64": "model.eos_token_id=64 is outside vocab_size=64",
    "model.rope_scaling.factor=4 model.rope_scaling.original_max_position_embeddings=256": (
        "model.max_position_embeddings=2048 exceeds YaRN's reach of 1024 (factor=4 * "
    ),
    "learner.layer_spec=transformer_engine": (
        "learner.layer_spec=transformer_engine needs cluster.backend=cuda, got cpu"
    ),
    "EP2 learner.dispatcher=flex": "learner.dispatcher=flex needs cluster.backend=cuda, got cpu",
    "GPU learner.dispatcher=flex": "learner.dispatcher=flex needs ep * etp of at least 2, got ep=1",
    "learner.grouped_gemm=true": "learner.grouped_gemm=true needs cluster.backend=cuda, got cpu",
    "learner.precision_aware_optimizer=true": (
        "learner.precision_aware_optimizer=true needs cluster.backend=cuda, got cpu"
    ),
    "learner.optimizer_offload=0.5": (
        "learner.optimizer_offload=0.5 needs cluster.backend=cuda, got cpu"
    ),
    "GPU learner.optimizer_offload=0.5 learner.precision=fp32": (
        "learner.optimizer_offload=0.5 needs learner.precision=bf16, got fp32"
    ),
    "GPU learner.precision_aware_optimizer=true learner.precision=fp32": (
        "learner.precision_aware_optimizer=true needs learner.precision=bf16, got fp32"
    ),
    "GPU learner.grouped_gemm=true": (
        "learner.grouped_gemm=true needs learner.layer_spec=transformer_engine, got local"
    ),
    "GPU learner.moments=bf16": (
        "learner.moments=bf16 needs learner.precision_aware_optimizer=true, got false"
    ),
    "GPU learner.gradients=bf16": (
        "learner.gradients=bf16 needs learner.precision_aware_optimizer=true, got false"
    ),
    "GPU AWARE learner.moments=bf16 learner.optimizer_offload=1": (
        "learner.optimizer_offload=1 updates on the host, where moments are fp32; use"
    ),
    "learner.adam_beta1=1": "learner.adam_beta1=1.0: must be at least 0 and below 1",
    "learner.optimizer_offload=-1": "learner.optimizer_offload=-1.0: must be between 0 and 1",
    "learner.megatron.recompute_modules=[moe]": (
        "learner.megatron.recompute_modules=['moe']: say it as learner.recompute_modules"
    ),
    "learner.recompute_modules=[mlp]": (
        "learner.recompute_modules=['mlp'] has no meaning with learner.recompute=none"
    ),
    "SELECTIVE learner.recompute_modules=[mlp,router]": (
        "learner.recompute_modules=['mlp', 'router']: router is none of core_attn, layernorm"
    ),
    "SELECTIVE learner.recompute_modules=[]": "learner.recompute_modules=[] recomputes nothing",
    "SELECTIVE learner.recompute_modules=[moe_act]": (
        "learner.recompute_modules: moe_act needs learner.grouped_gemm=true, got false"
    ),
    "SELECTIVE learner.recompute_modules=[layernorm]": (
        "learner.recompute_modules: layernorm needs learner.layer_spec=transformer_engine"
    ),
    "SELECTIVE LLAMA learner.recompute_modules=[mlp,moe]": (
        "learner.recompute_modules=['mlp', 'moe']: llama has no moe; use core_attn, layernorm, mlp"
    ),
    "GPU learner.fp8=blockwise": "learner.fp8=blockwise needs learner.layer_spec=transformer_engi",
    "GPU learner.fp8=blockwise learner.layer_spec=transformer_engine learner.precision=fp32": (
        "learner.fp8=blockwise needs learner.precision=bf16, got fp32"
    ),
    "cluster.learner_processes_per_node=3 parallel.cp=3 model.rope_scaling.factor=40": (
        "cp=3: megatron-core cuts YaRN's table of model.rope_scaling.original_max_position_embeddi"
        "ngs=4096 positions in 6 equal chunks"
    ),
    "learner.bucket_parameters=1000": (
        "learner.bucket_parameters=1000 has no meaning without learner.overlap_grad_reduce"
    ),
    "learner.megatron.tensor_model_parallel_size=2": (
        "learner.megatron.tensor_model_parallel_size=2: parallel.* and the loss decide this"
    ),
    "learner.megatron.calculate_per_token_loss=false": (
        "learner.megatron.calculate_per_token_loss=False: parallel.* and the loss decide this"
    ),
    "learner.megatron.moe_aux_loss_coeff=0.01": (
        "learner.megatron.moe_aux_loss_coeff=0.01: Megatron weighs auxiliary losses by microbatch"
    ),
    "learner.megatron.moe_expert_capacity_factor=1.5": (
        "learner.megatron.moe_expert_capacity_factor=1.5: an expert's capacity is a share of"
    ),
    "learner.megatron.attention_dropout=0.1": (
        "learner.megatron.attention_dropout=0.1: its random draws differ from layout to layout"
    ),
    "learner.warmup_steps=101": "learner.warmup_steps=101 exceeds stage.steps=100",
    "learner.lr_schedule=cosine learner.min_lr=1e-5": (
        "learner.min_lr=1e-05 exceeds learner.lr=3e-06"
    ),
    "data.source=text": "data.source=text does not serve rl; use arithmetic or gsm8k or jsonl",
    "stage.kind=sft data.source=gsm8k": (
        "data.source=gsm8k does not serve sft; use arithmetic or text or sft"
    ),
    "data.source=gsm8k": "data.source=gsm8k needs data.path=FILE",
    "rollout.max_response_tokens=1025": (
        "data.max_prompt_tokens=1024 + a response of 1025 = 2049 exceeds "
        "rollout.context_tokens=2048"
    ),
    "rollout.context_tokens=4096": (
        "rollout.context_tokens=4096 exceeds model.max_position_embeddings=2048"
    ),
    "learner.tokens_per_microbatch=2047": (
        "data.max_prompt_tokens=1024 + a response of 1024 = 2048 exceeds "
        "learner.tokens_per_microbatch=2047"
    ),
    "stage.eval_every=5 stage.eval_prompts=65": ("stage.eval_prompts=65 exceeds data.held_out=64"),
    "rollout.later_from_step=3": (
        "rollout.later_from_step=3 and max_response_tokens_later=None go together"
    ),
    "stage.only=train": "stage.only=train needs rollout.replay=FOLDER",
    "rollout.replay=kept": "rollout.replay=kept starts no engine; add stage.only=train",
    "stage.kind=eval stage.only=train": "stage.only=train halves a step of rl",
    "rollout.steps=4 stage.eval_every=6": (
        "stage.eval_every=6 must be a multiple of rollout.steps=4"
    ),
    "rollout.steps=4 stage.save_every=6": (
        "stage.save_every=6 must be a multiple of rollout.steps=4"
    ),
    "LLAMA algorithm.replay_routing=true": (
        "algorithm.replay_routing=true, but none of the 4 layers of this llama model routes"
    ),
    "model.first_k_dense_replace=4 algorithm.replay_routing=true": (
        "algorithm.replay_routing=true, but none of the 4 layers of this deepseek_v3 model routes"
    ),
    "algorithm.replay_routing=true learner.megatron.moe_router_fusion=true": (
        "algorithm.replay_routing=true: megatron-core's fused router cannot be told what to choose"
    ),
    "rewards.accuracy=0 rewards.format=0": "rewards.accuracy=0 and rewards.format=0 leave",
    "cluster.learner_nodes=2": "cluster.host=127.0.0.1 cannot be reached from the other 1 nodes",
    "cluster.host=0.0.0.0": "cluster.host=0.0.0.0 is no address that others can call",
    "cluster.gpus_per_engine=1": "cluster.gpus_per_engine=1 needs cluster.backend=cuda",
    "CUDA": "rollout.engine=sglang on cuda needs cluster.gpus_per_engine of at least 1, got 0",
    "CUDA stage.kind=sft cluster.learner_processes_per_node=9": (
        "cluster.learner_processes_per_node=9 exceeds gpus_per_node=8"
    ),
    "CUDA cluster.gpus_per_engine=12": "cluster.gpus_per_engine=12 must be whole nodes",
    "CUDA cluster.gpus_per_engine=4 rollout.engines=2": (
        "learner_processes_per_node=1 + 2 engines * 4 GPUs exceed gpus_per_node=8"
    ),
    "CUDA NET cluster.gpus_per_engine=16 rollout.engines=2 cluster.engine_nodes=3": (
        "rollout.engines=2 of 16 GPUs need 4 nodes of 8, got cluster.engine_nodes=3"
    ),
    "CUDA NET cluster.gpus_per_engine=3 rollout.engines=5 cluster.engine_nodes=2": (
        "rollout.engines=5 of 3 GPUs need 3 nodes of 8, got cluster.engine_nodes=2"
    ),
    "name=a/b": "name='a/b': results go to runs/<name>",
    "name=..": "name='..': results go to runs/<name>",
    "parallel.tp=0": "parallel.tp=0: must be at least 1",
    "algorithm.group_size=1": "algorithm.group_size=1: must be at least 2",
    "learner.lr=.nan": "learner.lr=nan: must be at least 0",
    "learner.lr=-1": "learner.lr=-1.0: must be at least 0",
    "rollout.temperature=0": "rollout.temperature=0.0: must be above 0",
    "rollout.probe_tolerance=0": "rollout.probe_tolerance=0.0: must be above 0",
    "LLAMA rollout.quantization=fp8": (
        "rollout.quantization=fp8 is the form of DeepSeek-V3's weights, not of llama's; use none"
    ),
    "FP8 GPU model.kv_lora_rank=64": (
        "rollout.quantization=fp8: SGLang wants whole blocks of 128, but kv_lora_rank is 64"
    ),
    "FP8 TP2 rollout.sync=disk model.intermediate_size=640": (
        "rollout.quantization=fp8 with rollout.sync=disk: tp=2 cuts intermediate_size = 640 inside"
    ),
    "FP8 TP2 rollout.sync=disk parallel.etp=2 model.moe_intermediate_size=128 "
    "model.n_shared_experts=2": (
        "rollout.quantization=fp8 with rollout.sync=disk: etp=2 cuts moe_intermediate_size = 128"
    ),
    "rollout.engine=sglang rollout.sglang_args=[--host=0.0.0.0]": (
        "rollout.sglang_args has --host, which the launcher gives: set cluster.host"
    ),
    "rollout.engine=sglang rollout.sglang_args=[--api-key,secret]": (
        "rollout.sglang_args has --api-key, which the launcher gives: set the environment variable"
    ),
    "stage.kind=eval rollout.engine=sglang rollout.sync=p2p cluster.host=8.8.8.8": (
        "rollout.sync=p2p opens a route of SGLang that reads pickles, and cluster.host=8.8.8.8 is"
    ),
    "FP8 rollout.sync=p2p": (
        "rollout.sync=p2p writes slices into the embedded engine's float32 weights as they are"
    ),
    "rollout.engine=sglang rollout.sync=p2p cluster.host=8.8.8.8": (
        "rollout.sync=p2p opens a route of SGLang that reads pickles, and cluster.host=8.8.8.8 is"
    ),
    "rollout.request_timeout_s=.inf": "rollout.request_timeout_s=inf: must be above 0",
    "rollout.top_p=1.1": "rollout.top_p=1.1: must be above 0 and at most 1",
    "rollout.top_k=0": "rollout.top_k=0: must be at least 1, or -1 for off",
    "rewards.max_error_fraction=2": "rewards.max_error_fraction=2.0: must be between 0 and 1",
    "cluster.router_port=70000": "cluster.router_port=70000: must be between 0 and 65535",
    "stage.save_every=-2": "stage.save_every=-2: must be at least 0, or -1 for never",
    "model.rope_scaling.factor=0.5": "model.rope_scaling.factor=0.5: must be at least 1",
}

SHORTHANDS = {
    "FP8": [
        "rollout.quantization=fp8",
        *(f"model.{name}=256" for name in ("hidden_size", "intermediate_size", "q_lora_rank")),
        *(f"model.{name}=256" for name in ("moe_intermediate_size", "kv_lora_rank")),
        *(f"model.{name}=64" for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")),
    ],
    "TP2": ["parallel.tp=2", "cluster.learner_processes_per_node=2"],
    "PP4": ["parallel.pp=4", "cluster.learner_processes_per_node=4"],
    "CUDA": CUDA,
    "GPU": [*CUDA, "cluster.gpus_per_engine=1"],
    "NET": ["cluster.host=10.0.0.1"],
    "LLAMA": ["model.architecture=llama"],
    "MTP": ["model.num_nextn_predict_layers=1", "learner.mtp_loss_weight=0.3"],
    "EP2": ["parallel.ep=2", "cluster.learner_processes_per_node=2"],
    "AWARE": ["learner.precision_aware_optimizer=true"],
    "SELECTIVE": ["learner.recompute=selective"],
}


@pytest.mark.parametrize(("layers", "start"), SINGLE.items())
def test_a_violation_is_reported_alone_with_its_values(layers: str, start: str) -> None:
    expanded = [one for word in layers.split() for one in SHORTHANDS.get(word, [word])]
    (violation,) = _violations(*expanded)
    assert violation.startswith(start)


def test_all_violations_come_at_once() -> None:
    found = _violations(
        "cluster.learner_processes_per_node=4",
        "parallel.tp=3",
        "model.vocab_size=64",
        "rollout.top_p=0",
        "stage.only=train",
    )
    assert [violation.split(";")[0] for violation in found] == [
        "rollout.top_p=0.0: must be above 0 and at most 1",
        "tp=3 * pp=1 * cp=1 = 3 must divide the learner's 4 ranks "
        "(learner_nodes=1 * learner_processes_per_node=4)",
        "tp=3 must divide model.num_attention_heads=4",
        "tp=3 must divide model.vocab_size=64",
        "tp=3 must divide model.intermediate_size=128",
        "tp=3 must divide model.n_shared_experts * moe_intermediate_size=32",
        "stage.only=train needs rollout.replay=FOLDER of kept rollouts",
    ]


VALID = [
    # Experts fold tp * cp * dp: tp2 pp2 ep2 needs four ranks, not eight.
    "parallel.tp=2 parallel.pp=2 parallel.ep=2 cluster.learner_processes_per_node=4",
    "parallel.tp=2 parallel.ep=4 parallel.etp=2 cluster.learner_processes_per_node=8",
    "PP4 model.num_hidden_layers=8 parallel.vpp=2",
    "PP4 model.num_hidden_layers=61 parallel.layers_in_last_stage=13",
    "PP4 model.num_hidden_layers=14 parallel.vpp=2 parallel.layers_in_last_stage=2",
    "cluster.learner_processes_per_node=2 parallel.cp=2 parallel.ep=2 learner.dispatcher=allgather",
    "parallel.pp=2 cluster.learner_processes_per_node=2 parallel.layers_in_first_stage=1 "
    "parallel.layers_in_last_stage=3",
    "model.n_group=1 model.topk_group=1 model.num_experts_per_tok=3",
    "learner.overlap_grad_reduce=true learner.bucket_parameters=1000 learner.overlap_param_gather="
    "true learner.megatron.moe_aux_loss_coeff=0",
    "stage.only=train rollout.replay=kept data.source=gsm8k",
    "FP8 GPU",
    "FP8 TP2 rollout.sync=disk",
    # Where rank 0 quantises whole tensors, no cut of the learner's matters.
    "TP2 rollout.quantization=fp8",
    # SGLang also serves on a CPU.
    "rollout.engine=sglang",
    # Documents have no response limit and start no engine.
    "stage.kind=sft rollout.max_response_tokens=9999",
    "CUDA stage.kind=sft",
    "CUDA NET cluster.gpus_per_engine=3 rollout.engines=4 cluster.engine_nodes=2",
    "rollout.later_from_step=8 rollout.max_response_tokens=8 rollout.max_response_tokens_later=16",
    "rollout.steps=4 stage.eval_every=8 stage.save_every=-1",
]


@pytest.mark.parametrize("layers", VALID)
def test_what_can_run_is_not_refused(layers: str) -> None:
    expanded = [one for word in layers.split() for one in SHORTHANDS.get(word, [word])]
    assert _violations(*expanded) == []
