"""Every key of a run, by section. Values are frozen; derived quantities live in ``derived.py``.

A string under a field is its documentation. The range of each value is in ``ranges.py``;
constraints between values are in ``checks.py``.
"""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Parallel:
    """Sizes of the mesh axes. dp is what remains: world / (tp * pp * cp)."""

    tp: int = 1
    """Tensor parallel size; sequence parallelism is on whenever it is above 1."""
    pp: int = 1
    """Pipeline stages."""
    vpp: int | None = None
    """Virtual pipeline chunks per stage (interleaved 1F1B)."""
    cp: int = 1
    """Context parallel size."""
    ep: int = 1
    """Expert parallel size; folds the ranks of tp * cp * dp."""
    etp: int = 1
    """Tensor parallel size inside one expert."""
    layers_in_first_stage: int | None = None
    """Layers of the first pipeline stage when they do not divide evenly."""
    layers_in_last_stage: int | None = None
    """Layers of the last pipeline stage when they do not divide evenly."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """How RoPE reaches further than it was trained, named as in config.json."""

    rope_type: Literal["yarn", "llama3"] = "yarn"
    """yarn: DeepSeek-V3 (arXiv 2309.00071). llama3: Llama 3.1 and 3.2 (arXiv 2407.21783)."""
    factor: float = 40.0
    original_max_position_embeddings: int = 4096
    low_freq_factor: float = 1.0
    """llama3 slows frequencies that turn less often than this in the original length."""
    high_freq_factor: float = 4.0
    """llama3 keeps frequencies that turn more often than this in the original length."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """The network, named as in config.json; where weights and tokenizer come from.

    Keys that ``architecture`` does not have keep their defaults.
    """

    init: str = "random"
    """``random``, a Hugging Face folder, or a checkpoint of ours (a ``step_NNNNNN`` folder)."""
    tokenizer: str = "arithmetic"
    """``arithmetic`` (built in), ``deepseek`` (published), or a folder with tokenizer.json."""
    architecture: Literal["deepseek_v3", "llama", "qwen2"] = "deepseek_v3"
    """deepseek_v3: MLA and experts. llama and qwen2: dense, with grouped-query attention."""
    vocab_size: int = 64
    hidden_size: int = 64
    intermediate_size: int = 128
    """Width of the dense MLP layers."""
    moe_intermediate_size: int = 32
    num_hidden_layers: int = 4
    first_k_dense_replace: int = 1
    """How many leading layers have a dense MLP."""
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    """Null: as many as num_attention_heads (llama, qwen2)."""
    head_dim: int | None = None
    """Null: hidden_size / num_attention_heads (llama, qwen2)."""
    attention_bias: bool = False
    """Biases of all four projections (llama); qwen2 always has those of query, key and value."""
    q_lora_rank: int | None = 32
    kv_lora_rank: int = 16
    qk_nope_head_dim: int = 16
    qk_rope_head_dim: int = 8
    v_head_dim: int = 16
    n_routed_experts: int = 8
    n_shared_experts: int = 1
    num_experts_per_tok: int = 4
    n_group: int = 4
    topk_group: int = 2
    """Must be half of num_experts_per_tok: then Megatron and Hugging Face limit groups alike."""
    routed_scaling_factor: float = 2.5
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 2048
    num_nextn_predict_layers: int = 0
    """MTP layers (deepseek_v3); built only where learner.mtp_loss_weight trains them."""
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    eos_token_id: int = 1
    bos_token_id: int | None = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Learner:
    """Optimizer, precision and memory of the Megatron learner."""

    lr: float = 3e-6
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    min_lr: float = 0.0
    warmup_steps: int = 0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16 keeps fp32 master weights in the distributed optimizer."""
    tokens_per_microbatch: int = 16384
    """Packed tokens of one forward pass on one model replica."""
    logprob_chunk_tokens: int = 1024
    """Tokens whose vocabulary row exists at once in the loss."""
    expert_bias_update_rate: float = 0.0
    """Step of the router's loss-free balance (V3 pretraining: 1e-3); 0 freezes the bias."""
    mtp_loss_weight: float = 0.0
    """Weight of the MTP layers' loss (V3 pretraining: 0.3, then 0.1); 0 leaves them out. In rl they
    learn from the policy without moving it."""
    recompute: Literal["none", "selective", "full"] = "none"
    """selective: of ``recompute_modules``. full: every layer from its input."""
    recompute_modules: list[str] = field(default_factory=lambda: ["core_attn"])
    """Megatron's names: core_attn, layernorm, mla_up_proj, mlp, moe, moe_act, shared_experts."""
    precision_aware_optimizer: bool = False
    """TransformerEngine's FusedAdam: beside bf16 weights it keeps the other 16 bits of the fp32
    masters, and allows ``moments`` and ``gradients`` in bf16."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """Adam's two averages (DeepSeek-V3: bf16)."""
    gradients: Literal["fp32", "bf16"] = "fp32"
    """In which they are summed over microbatches and dp."""
    optimizer_offload: float = 0.0
    """Share of masters, moments and their update that lives on the host."""
    layer_spec: Literal["local", "transformer_engine"] = "local"
    """local: own TE-free modules (CPU, and a reference on CUDA)."""
    dispatcher: Literal["alltoall", "allgather", "flex"] = "alltoall"
    grouped_gemm: bool = False
    fp8: Literal["none", "blockwise"] = "none"
    overlap_grad_reduce: bool = False
    """Reduce gradients bucket by bucket while the last backward pass goes on."""
    overlap_param_gather: bool = False
    """Gather updated weights bucket by bucket while the next forward pass goes on."""
    bucket_parameters: int | None = None
    """Parameters of a bucket; null: Megatron's, a million per rank of dp * cp, at least 40."""
    megatron: dict[str, Any] = field(default_factory=dict)
    """Further fields of Megatron's TransformerConfig (deepseek_v3: MLATransformerConfig), checked
    against megatron-core's own dataclass."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """The engines and how samples are drawn."""

    engine: Literal["embedded", "sglang"] = "embedded"
    engines: int = 1
    """Number of engines (HTTP servers) behind the router."""
    steps: int = 1
    """Optimizer steps fed by one rollout; weights are synced once per rollout."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_response_tokens: int = 1024
    max_response_tokens_later: int | None = None
    """Response limit from ``later_from_step`` on."""
    later_from_step: int | None = None
    context_tokens: int = 2048
    """Longest prompt + response an engine holds."""
    max_running_requests: int = 64
    """Decoding slots of one engine."""
    concurrency: int = 256
    """Requests in flight per data-parallel leader."""
    request_timeout_s: float = 600.0
    engine_start_timeout_s: float = 300.0
    engine_silence_timeout_s: float = 600.0
    """An engine that answers no health check for so long is ended and started again."""
    max_retries: int = 8
    """Attempts per sample over engine deaths before the run ends with a clear error."""
    max_restarts: int = 3
    """Restarts of one engine before the run ends with a clear error."""
    sync: Literal["broadcast", "p2p", "disk"] = "broadcast"
    """How weights reach engines. broadcast: whole tensors from rank 0, with any server. p2p: each
    slice once, to the engine rank that holds it. disk: a folder that engines and learner share."""
    sync_bucket_mb: int = 512
    """Weights are broadcast in calls of at most this size."""
    verify: Literal["sample", "all"] = "sample"
    """Tensors whose checksums are compared after every sync. sample: others each time."""
    probe_tolerance: float | None = None
    """Mean log-prob difference between engine and learner above which a probe after a sync fails;
    null: 1e-4 in fp32, 0.1 in bf16, 0.2 with fp8 weights."""
    quantization: Literal["none", "fp8"] = "none"
    """fp8: engines get DeepSeek-V3's form, e4m3 codes with a scale per 128x128 block."""
    sglang_python: str = "python"
    """Interpreter of the environment in which SGLang is installed (requirements/sglang.txt)."""
    sglang_args: list[str] = field(default_factory=list)
    """Further arguments of sglang.launch_server, as written on its command line."""
    sglang_env: dict[str, str] = field(default_factory=dict)
    """Further environment variables of SGLang servers."""
    replay: str | None = None
    """Folder of kept rollouts: train on them, start no engine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """Prompts (rl, eval) or documents (sft)."""

    source: Literal["arithmetic", "gsm8k", "jsonl", "text", "sft"] = "arithmetic"
    """arithmetic: generated from the seed. gsm8k: question and answer with ``####``.
    jsonl: {"prompt", "answer"}. text: {"text"} documents. sft: {"prompt", "response"} pairs."""
    path: str | None = None
    eval_path: str | None = None
    """Held-out prompts; without it the last ``held_out`` lines of ``path`` are held out."""
    held_out: int = 64
    template: Literal["r1_zero", "brief", "none"] = "r1_zero"
    """r1_zero: the paper's conversation. brief: ``User: {prompt} Assistant:``. none: as written."""
    size: int = 4096
    """Number of generated prompts or documents (arithmetic only)."""
    difficulty: int = 4
    """Terms per generated problem, at most: 3 to 9 (arithmetic only)."""
    max_prompt_tokens: int = 1024
    """Longer prompts are an error at load."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rewards:
    """Weights of the reward's parts; 0 leaves a part out."""

    accuracy: float = 1.0
    format: float = 1.0
    math_workers: int = 1
    """Killable grader processes per data-parallel leader."""
    math_timeout_s: float = 10.0
    """CPU seconds for one comparison; past it the answer is wrong and the worker is replaced."""
    max_error_fraction: float = 0.05
    """Infrastructure errors above this share of a rollout end the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Algorithm:
    """GRPO as in DeepSeek-R1 (arXiv 2501.12948); design constants of the stage."""

    prompts_per_step: int = 32
    group_size: int = 16
    clip_low: float = 10.0
    """rho is clipped from below at 1 - clip_low (R1: 10, i.e. never)."""
    clip_high: float = 10.0
    """rho is clipped from above at 1 + clip_high."""
    kl_coef: float = 0.001
    """Weight of the k3 estimator against the reference; 0 skips the reference pass."""
    entropy_coef: float = 0.0
    """Weight of the policy's entropy in the objective (R1: none)."""
    ratio: Literal["token", "sequence"] = "token"
    normalize: Literal["sample", "token"] = "sample"
    """sample: mean over tokens, then over samples. token: mean over all tokens of the batch."""
    reference_refresh_steps: int = 0
    """Replace the reference by the policy every so many steps; 0 never."""
    importance_cap: float | None = None
    """Truncated importance sampling of policy / sampler probability at this cap; off when null."""
    replay_routing: bool = False
    """Train with the experts that the engine chose for each token (R3, arXiv 2510.11370)."""
    drop_uniform_groups: bool = False
    """Leave out groups whose raw accuracy is all 0 or all 1 (dynamic sampling)."""
    mask_overlong: bool = False
    """Samples cut by the length limit do not enter the loss."""
    sequences_per_step: int = 64
    """Documents per optimizer step (sft only)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Length of the stage, evaluation and checkpoints."""

    kind: Literal["rl", "sft", "eval"] = "rl"
    """Which checks apply; ``r1mega rl | sft | eval`` sets it to its own verb."""
    steps: int = 100
    only: Literal["all", "rollout", "train"] = "all"
    """rollout: sample and keep, no training. train: train on ``rollout.replay``."""
    eval_every: int = 0
    """Evaluate every so many steps (and at the end); 0 never."""
    eval_prompts: int = 64
    eval_samples: int = 4
    """k responses per prompt: pass@1 is the mean of their correctness."""
    eval_temperature: float = 0.6
    eval_top_p: float = 0.95
    save_every: int = 0
    """Checkpoint every so many steps (and at the end); 0 only at the end; -1 never."""
    keep_last: int = 2
    keep_rollouts: bool = False
    """Write every rollout under runs/<name>/rollouts/ for replay."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Which machines run what."""

    backend: Literal["cpu", "cuda"] = "cpu"
    learner_nodes: int = 1
    learner_processes_per_node: int = 1
    """World size of the learner = nodes * processes per node."""
    engine_nodes: int = 0
    """Nodes of the rollout fleet beside the learner's (0: engines share the learner's node)."""
    gpus_per_node: int = 8
    """GPUs of one machine (cuda only)."""
    gpus_per_engine: int = 0
    """GPUs of one engine; above gpus_per_node it spans whole nodes. 0 on CPU."""
    host: str = "127.0.0.1"
    """Address that servers bind to."""
    master_port: int = 0
    """Rendezvous port of the learner; 0 picks a free one."""
    router_port: int = 0
    """0 picks a free one."""
    collective_timeout_s: float = 600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Where results go."""

    root: str = "runs"
    resume: bool = True
    """Continue from the newest checkpoint of runs/<name> when there is one."""
    sample_rows: int = 8
    """Sample responses written to samples.jsonl per step."""
    wandb_project: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """A whole run."""

    name: str = "run"
    seed: int = 1
    run: Run = field(default_factory=Run)
    parallel: Parallel = field(default_factory=Parallel)
    model: Model = field(default_factory=Model)
    learner: Learner = field(default_factory=Learner)
    rollout: Rollout = field(default_factory=Rollout)
    data: Data = field(default_factory=Data)
    rewards: Rewards = field(default_factory=Rewards)
    algorithm: Algorithm = field(default_factory=Algorithm)
    stage: Stage = field(default_factory=Stage)
    cluster: Cluster = field(default_factory=Cluster)
