"""Constraints between keys, all reported at once, before any process starts.

Each sentence says what is wrong, the values, and what to do. Only what really cannot run, or would
silently do something else than asked, is a violation.
"""

from collections.abc import Iterator
from pathlib import PurePath

from r1mega.config import derived, network, ranges
from r1mega.config.errors import ConfigError
from r1mega.config.learner_checks import learner_violations
from r1mega.config.network_checks import network_violations
from r1mega.config.schema import Config, Data, Learner, Model, Parallel, Rollout, Stage
from r1mega.config.sync_checks import sync_violations

_DOCUMENT_SOURCES = ("arithmetic", "text", "sft")
_PROMPT_SOURCES = ("arithmetic", "gsm8k", "jsonl")


def check(config: Config) -> None:
    """Raise one ConfigError that lists every violation."""
    found = list(ranges.size_violations(config))
    # Arithmetic between keys divides by sizes, so it has to wait until each of them is sound.
    between = [] if found else list(_between_keys(config))
    found += [*ranges.value_violations(config), *between]
    if found:
        count = "1 problem" if len(found) == 1 else f"{len(found)} problems"
        lines = [f"  {number}. {violation}" for number, violation in enumerate(found, start=1)]
        raise ConfigError("\n".join([f"{count} in this configuration:", *lines]))


def _between_keys(config: Config) -> Iterator[str]:
    samples = config.stage.kind in ("rl", "eval")
    yield from _name(config.name)
    yield from _mesh(config)
    yield from _pipeline(config.model.num_hidden_layers, config.parallel)
    yield from network_violations(config.model, config.parallel, config.learner)
    yield from learner_violations(config)
    yield from _source(config.stage, config.data)
    yield from _cluster(config)
    if samples:
        yield from _lengths(config)
        yield from _evaluation(config.stage, config.data)
        yield from sync_violations(config)
    if config.stage.kind == "rl":
        yield from _rollout(config.rollout, config.stage)
        yield from _rewards(config)
        if config.algorithm.replay_routing:
            yield from _replay_routing(config.model, config.learner)


def _name(name: str) -> Iterator[str]:
    if name in ("", ".", "..") or PurePath(name).name != name:
        yield f"name={name!r}: results go to runs/<name>, so it must be one folder name"


def _mesh(config: Config) -> Iterator[str]:
    p, world = config.parallel, derived.world_size(config.cluster)
    replica = p.tp * p.pp * p.cp
    sizes = f"tp={p.tp} * pp={p.pp} * cp={p.cp}"
    if world % replica:
        yield (
            f"{sizes} = {replica} must divide the learner's {world} ranks "
            f"(learner_nodes={config.cluster.learner_nodes} * "
            f"learner_processes_per_node={config.cluster.learner_processes_per_node}); "
            "change parallel.* or cluster.learner_*"
        )
        return
    dp = world // replica
    stage_ranks = p.tp * p.cp * dp
    if stage_ranks % (p.ep * p.etp):
        yield (
            f"ep={p.ep} * etp={p.etp} = {p.ep * p.etp} must divide the {stage_ranks} ranks of a "
            f"pipeline stage (tp={p.tp} * cp={p.cp} * dp={dp}); change parallel.ep or parallel.etp"
        )
    training = {
        "rl": (derived.samples_per_step(config.algorithm), "prompts_per_step"),
        "sft": (config.algorithm.sequences_per_step, "sequences_per_step"),
    }
    sequences, key = training.get(config.stage.kind, (dp, ""))
    if sequences < dp:
        yield (
            f"a step of {sequences} sequences leaves some of dp={dp} replicas without one; raise "
            f"algorithm.{key}, or parallel.tp, pp or cp"
        )


def _pipeline(num_layers: int, p: Parallel) -> Iterator[str]:
    uneven = p.layers_in_first_stage is not None or p.layers_in_last_stage is not None
    if p.pp == 1 and (uneven or p.vpp is not None):
        yield (
            "layers_in_first_stage, layers_in_last_stage and vpp need pp of at least 2, got pp=1; "
            "unset them or raise parallel.pp"
        )
        return
    try:
        stages = derived.layers_per_stage(num_layers, p)
    except ValueError as error:
        yield (
            f"{num_layers} layers do not spread over pp={p.pp} stages: {error}; change "
            "parallel.pp, layers_in_first_stage or layers_in_last_stage"
        )
        return
    if p.vpp is None:
        return
    if undivided := sorted({size for size in stages if size % p.vpp}):
        yield (
            f"vpp={p.vpp} must divide the {undivided[0]} layers of a pipeline stage: its virtual "
            "chunks are equally long"
        )
    elif p.pp == 2 and None not in (p.layers_in_first_stage, p.layers_in_last_stage):
        yield (
            f"vpp={p.vpp} with both layers_in_first_stage={p.layers_in_first_stage} and "
            f"layers_in_last_stage={p.layers_in_last_stage} at pp=2 makes megatron-core divide by "
            "the zero stages in between; set one of the two, the other follows"
        )


def _source(stage: Stage, data: Data) -> Iterator[str]:
    if stage.only != "all" and stage.kind != "rl":
        yield f"stage.only={stage.only} halves a step of rl; {stage.kind} has no such step: use all"
    usable = _DOCUMENT_SOURCES if stage.kind == "sft" else _PROMPT_SOURCES
    if data.source not in usable:
        yield f"data.source={data.source} does not serve {stage.kind}; use {' or '.join(usable)}"
    elif data.source != "arithmetic" and data.path is None and stage.only != "train":
        yield f"data.source={data.source} needs data.path=FILE"


def _lengths(config: Config) -> Iterator[str]:
    rollout = config.rollout
    response = derived.longest_response_tokens(rollout)
    longest = derived.longest_sequence_tokens(config.data, rollout)
    parts = f"data.max_prompt_tokens={config.data.max_prompt_tokens} + a response of {response}"
    if longest > rollout.context_tokens:
        yield f"{parts} = {longest} exceeds rollout.context_tokens={rollout.context_tokens}"
    if rollout.context_tokens > config.model.max_position_embeddings:
        yield (
            f"rollout.context_tokens={rollout.context_tokens} exceeds "
            f"model.max_position_embeddings={config.model.max_position_embeddings}"
        )
    if config.stage.kind == "rl" and longest > config.learner.tokens_per_microbatch:
        yield (
            f"{parts} = {longest} exceeds "
            f"learner.tokens_per_microbatch={config.learner.tokens_per_microbatch}: a sequence is "
            "never cut, so one microbatch must hold the longest"
        )


def _evaluation(stage: Stage, data: Data) -> Iterator[str]:
    evaluates = stage.kind == "eval" or stage.eval_every > 0
    if evaluates and data.eval_path is None and data.held_out < stage.eval_prompts:
        yield (
            f"stage.eval_prompts={stage.eval_prompts} exceeds data.held_out={data.held_out}; "
            "hold out more or name data.eval_path"
        )


def _rollout(rollout: Rollout, stage: Stage) -> Iterator[str]:
    if (rollout.max_response_tokens_later is None) != (rollout.later_from_step is None):
        yield (
            f"rollout.later_from_step={rollout.later_from_step} and "
            f"max_response_tokens_later={rollout.max_response_tokens_later} go together: "
            "set both or neither"
        )
    if stage.only == "train" and rollout.replay is None:
        yield "stage.only=train needs rollout.replay=FOLDER of kept rollouts"
    if stage.only != "train" and rollout.replay is not None:
        yield f"rollout.replay={rollout.replay} starts no engine; add stage.only=train"
    # Between two syncs the engines lag the learner, and a rollout in the middle is not saved.
    for name, every in (("eval_every", stage.eval_every), ("save_every", stage.save_every)):
        if every > 0 and every % rollout.steps:
            yield (
                f"stage.{name}={every} must be a multiple of rollout.steps={rollout.steps}: "
                "weights reach the engines once per rollout"
            )


def _replay_routing(model: Model, learner: Learner) -> Iterator[str]:
    if network.num_dense_layers(model) == model.num_hidden_layers:
        yield (
            f"algorithm.replay_routing=true, but none of the {model.num_hidden_layers} layers of "
            f"this {model.architecture} model routes to experts; use false"
        )
    if learner.megatron.get("moe_router_fusion"):
        yield (
            "algorithm.replay_routing=true: megatron-core's fused router cannot be told what to "
            "choose; unset learner.megatron.moe_router_fusion"
        )


def _rewards(config: Config) -> Iterator[str]:
    if config.rewards.accuracy == 0 and config.rewards.format == 0:
        yield "rewards.accuracy=0 and rewards.format=0 leave nothing to learn; weigh one of them"


def _cluster(config: Config) -> Iterator[str]:
    cluster = config.cluster
    if derived.num_nodes(cluster) > 1 and cluster.host in ("127.0.0.1", "localhost", "::1"):
        yield (
            f"cluster.host={cluster.host} cannot be reached from the other "
            f"{derived.num_nodes(cluster) - 1} nodes; name an address of the cluster's network"
        )
    if cluster.host in ("0.0.0.0", "::"):
        yield (
            f"cluster.host={cluster.host} is no address that others can call: name this machine's "
            "own in the cluster's network"
        )
    if cluster.backend == "cuda":
        yield from _gpus(config)
    elif cluster.gpus_per_engine:
        yield f"cluster.gpus_per_engine={cluster.gpus_per_engine} needs cluster.backend=cuda"


def _gpus(config: Config) -> Iterator[str]:
    cluster, engines = config.cluster, config.rollout.engines
    node, learner = cluster.gpus_per_node, cluster.learner_processes_per_node
    if learner > node:
        yield f"cluster.learner_processes_per_node={learner} exceeds gpus_per_node={node}"
    starts_engines = config.stage.kind != "sft" and config.stage.only != "train"
    if not starts_engines or config.rollout.engine == "embedded":
        return
    size, total = cluster.gpus_per_engine, derived.engine_gpus(cluster, config.rollout)
    if size == 0:
        yield "rollout.engine=sglang on cuda needs cluster.gpus_per_engine of at least 1, got 0"
    elif size > node and size % node:
        yield f"cluster.gpus_per_engine={size} must be whole nodes of gpus_per_node={node}"
    elif cluster.engine_nodes == 0:
        # Learner and engines use separate devices, also on one machine.
        if learner + total > node:
            yield (
                f"learner_processes_per_node={learner} + {engines} engines * {size} GPUs exceed "
                f"gpus_per_node={node}; set cluster.engine_nodes or use fewer"
            )
    else:
        needed = engines * (size // node) if size > node else -(-engines // (node // size))
        if needed > cluster.engine_nodes:
            yield (
                f"rollout.engines={engines} of {size} GPUs need {needed} nodes of {node}, got "
                f"cluster.engine_nodes={cluster.engine_nodes}"
            )
