"""What follows from a configuration: sizes of axes, layers per stage, samples, rollouts, nodes.

Pure arithmetic on sections that passed ``checks``; nothing here is a key, so nothing can disagree.
"""

from math import ceil
from typing import Literal

from r1mega.config.schema import Algorithm, Cluster, Data, Learner, Parallel, Rollout, Stage


def world_size(cluster: Cluster) -> int:
    """Learner ranks."""
    return cluster.learner_nodes * cluster.learner_processes_per_node


def data_parallel_size(cluster: Cluster, parallel: Parallel) -> int:
    return world_size(cluster) // (parallel.tp * parallel.pp * parallel.cp)


def expert_data_parallel_size(cluster: Cluster, parallel: Parallel) -> int:
    """Replicas of one expert: ep and etp fold the tp * cp * dp ranks of a pipeline stage."""
    return world_size(cluster) // (parallel.pp * parallel.ep * parallel.etp)


def layers_per_stage(num_layers: int, parallel: Parallel) -> tuple[int, ...]:
    """Layers on each pipeline stage; raises ValueError when they do not spread."""
    first, last = parallel.layers_in_first_stage, parallel.layers_in_last_stage
    return spread_layers(num_layers, parallel.pp, first, last)


def spread_layers(
    num_layers: int, pp: int, first: int | None = None, last: int | None = None
) -> tuple[int, ...]:
    """``spread_layers(61, 4, last=13) == (16, 16, 16, 13)``.

    Raises ValueError when they do not spread: Megatron wants the stages between them equal.
    """
    middle = pp - (first is not None) - (last is not None)
    remaining = num_layers - (first or 0) - (last or 0)
    share = remaining // middle if middle else 0
    if share * middle != remaining or (middle and share < 1):
        given = " + ".join(str(size) for size in (first, last) if size is not None)
        outer = f" beside the {given} of the outer ones" if given else ""
        raise ValueError(f"{remaining} layers remain for {middle} stages of equal length{outer}")
    head = () if first is None else (first,)
    tail = () if last is None else (last,)
    return (*head, *(share,) * middle, *tail)


def even_stages(num_layers: int, pp: int) -> tuple[int | None, int | None]:
    """Layers of first and last stage for ``spread_layers``, so that the longest stage is as short
    as can be, and the shortest then as long: ``even_stages(61, 16) == (3, 2)``, the others have 4.

    None where all stages are equal. Raises ValueError when a stage would have no layer.
    """
    if pp > num_layers:
        raise ValueError(f"pp={pp} must be at most num_hidden_layers={num_layers}")
    if num_layers % pp == 0:
        return None, None
    candidates = []
    for share in (num_layers // pp, num_layers // pp + 1):  # of the stages between
        outer = num_layers - share * (pp - 2)
        first, last = outer - outer // 2, outer // 2
        if last >= 1:
            candidates.append(
                (max(share, first), max(share, first) - min(share, last), first, last)
            )
    _, _, first, last = min(candidates)
    return first, last


MtpMode = Literal["none", "joint", "detached"]


def mtp_mode(learner: Learner, stage: Stage) -> MtpMode:
    """Whether MTP layers are trained, and whether their loss also moves the trunk."""
    if learner.mtp_loss_weight == 0 or stage.kind == "eval":
        return "none"
    return "joint" if stage.kind == "sft" else "detached"


def samples_per_step(algorithm: Algorithm) -> int:
    return algorithm.prompts_per_step * algorithm.group_size


def samples_per_rollout(algorithm: Algorithm, rollout: Rollout) -> int:
    return samples_per_step(algorithm) * rollout.steps


def num_rollouts(stage: Stage, rollout: Rollout) -> int:
    """Rollouts of the whole stage; the last one may feed fewer steps."""
    return ceil(stage.steps / rollout.steps)


def max_response_tokens(rollout: Rollout, step: int) -> int:
    """The response limit in force at ``step`` (0-based)."""
    later, start = rollout.max_response_tokens_later, rollout.later_from_step
    return rollout.max_response_tokens if later is None or start is None or step < start else later


def longest_response_tokens(rollout: Rollout) -> int:
    return max(rollout.max_response_tokens, rollout.max_response_tokens_later or 0)


def longest_sequence_tokens(data: Data, rollout: Rollout) -> int:
    """Prompt and response together, at most."""
    return data.max_prompt_tokens + longest_response_tokens(rollout)


def engine_gpus(cluster: Cluster, rollout: Rollout) -> int:
    return rollout.engines * cluster.gpus_per_engine


def num_nodes(cluster: Cluster) -> int:
    return cluster.learner_nodes + cluster.engine_nodes
