"""``r1mega show``: the resolved configuration and every quantity that follows from it."""

from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.table import Table

from r1mega.config import Config, derived, network
from r1mega.config.load import to_yaml
from r1mega.weights.names import count_parameters

Row = tuple[str, str, str]  # quantity, value, how it comes about


def show(config: Config) -> None:
    """Print the configuration as YAML, then the derived quantities as a table."""
    console = Console()
    # soft_wrap: the YAML stays loadable when it is piped into a file.
    console.print(to_yaml(config), markup=False, soft_wrap=True)
    table = Table("quantity", "value", "from", box=box.SIMPLE)
    for section in (_ranks, _network, _work, _machines):
        for row in section(config):
            table.add_row(*row)
        table.add_section()
    console.print(table)


def _ranks(config: Config) -> Iterator[Row]:
    cluster, p = config.cluster, config.parallel
    yield (
        "learner ranks (world)",
        f"{derived.world_size(cluster)}",
        f"{cluster.learner_nodes} nodes x {cluster.learner_processes_per_node} processes",
    )
    dp = derived.data_parallel_size(cluster, p)
    yield "dense axes", f"tp {p.tp}  cp {p.cp}  dp {dp}  pp {p.pp}", "product: world"
    if not network.is_dense(config.model):
        edp = derived.expert_data_parallel_size(cluster, p)
        yield "expert axes", f"etp {p.etp}  ep {p.ep}  edp {edp}  pp {p.pp}", "fold tp cp dp"


def _network(config: Config) -> Iterator[Row]:
    model, p = config.model, config.parallel
    stages = derived.layers_per_stage(model.num_hidden_layers, p)
    yield "layers per stage", " ".join(map(str, stages)), f"{model.num_hidden_layers} layers"
    if p.vpp is not None:
        yield "layers per chunk", f"{stages[0] // p.vpp}", f"vpp {p.vpp}"
    yield "parameters", f"{count_parameters(model):,}", ""
    if network.is_dense(model):
        return
    yield (
        "experts per rank",
        f"{model.n_routed_experts // p.ep}",
        f"{model.n_routed_experts} in a layer",
    )
    yield (
        "active per token",
        f"{count_parameters(model, active=True):,}",
        f"{model.num_experts_per_tok} of {model.n_routed_experts} experts",
    )
    if model.num_nextn_predict_layers:
        yield from _mtp(config)


def _mtp(config: Config) -> Iterator[Row]:
    mode = derived.mtp_mode(config.learner, config.stage)
    how = {"none": "left out", "joint": "train the trunk too", "detached": "train beside the trunk"}
    yield "MTP layers, not counted", f"{config.model.num_nextn_predict_layers}", how[mode]


def _work(config: Config) -> Iterator[Row]:
    stage, budget = config.stage, config.learner.tokens_per_microbatch
    if stage.kind == "sft":
        yield "sequences per step", f"{config.algorithm.sequences_per_step}", ""
    elif stage.kind == "rl":
        yield from _samples(config)
    if stage.kind != "eval":
        yield "steps", f"{stage.steps:,}", ""
        yield "tokens per microbatch", f"{budget:,}", "at most, of one replica"
    if stage.kind == "eval" or stage.eval_every:
        responses = stage.eval_prompts * stage.eval_samples
        about = f"{stage.eval_prompts} prompts x {stage.eval_samples}"
        yield "evaluation responses", f"{responses:,}", about


def _samples(config: Config) -> Iterator[Row]:
    algorithm, rollout, stage = config.algorithm, config.rollout, config.stage
    per_step = derived.samples_per_step(algorithm)
    yield (
        "samples per step",
        f"{per_step:,}",
        f"{algorithm.prompts_per_step} prompts x {algorithm.group_size}",
    )
    per_rollout = derived.samples_per_rollout(algorithm, rollout)
    yield "samples per rollout", f"{per_rollout:,}", f"{rollout.steps} steps"
    rollouts = derived.num_rollouts(stage, rollout)
    yield "rollouts (weight syncs)", f"{rollouts:,}", f"{stage.steps:,} steps"
    yield "samples in all", f"{per_step * stage.steps:,}", ""
    prompts = algorithm.prompts_per_step * stage.steps
    # Only generated data has a size before it is read.
    size = config.data.size if config.data.source == "arithmetic" else None
    epochs = "" if size is None else f"{prompts / size:.2f} epochs of {size:,}"
    yield "prompts in all", f"{prompts:,}", epochs
    yield "response limit", f"{rollout.max_response_tokens:,}", "tokens"
    if rollout.later_from_step is not None:
        later = derived.max_response_tokens(rollout, rollout.later_from_step)
        yield "response limit later", f"{later:,}", f"from step {rollout.later_from_step:,}"
    longest = derived.longest_sequence_tokens(config.data, rollout)
    yield "longest sequence", f"{longest:,}", "prompt and response"
    step_tokens = per_step * longest
    dp = derived.data_parallel_size(config.cluster, config.parallel)
    most = -(-step_tokens // (dp * config.learner.tokens_per_microbatch))
    yield "microbatches per step", f"{most:,}", "if all were that long"


def _machines(config: Config) -> Iterator[Row]:
    cluster, rollout = config.cluster, config.rollout
    yield (
        "nodes",
        f"{derived.num_nodes(cluster)}",
        f"{cluster.learner_nodes} learner + {cluster.engine_nodes} engine",
    )
    if config.stage.kind == "sft":
        return
    yield "engines", f"{rollout.engines}", rollout.engine
    if cluster.backend == "cuda":
        yield (
            "engine GPUs",
            f"{derived.engine_gpus(cluster, rollout)}",
            f"{cluster.gpus_per_engine} per engine",
        )
    slots = rollout.engines * rollout.max_running_requests
    yield "decoding slots", f"{slots:,}", f"{rollout.max_running_requests} per engine"
