"""Which carrier takes the weights to the engines, and how what they hold is proved."""

from collections.abc import Callable
from functools import partial

import torch

from r1mega.cluster.commands import engine_dtype
from r1mega.cluster.engine_layout import engine_layout
from r1mega.config import Config
from r1mega.parallel.collectives import Team
from r1mega.rollout.broadcast import Broadcast, quantized
from r1mega.rollout.carrier import Carrier
from r1mega.rollout.checksum import cpu_checksum, cuda_checksum
from r1mega.rollout.disk import Disk
from r1mega.rollout.fleet import Fleet
from r1mega.rollout.p2p.carrier import PointToPoint
from r1mega.rollout.p2p.invite import invite_embedded, invite_sglang
from r1mega.rollout.predict import Parameter, engine_bytes, engine_parameters
from r1mega.rollout.probe import Probe
from r1mega.rollout.proof import Checksums, Proof
from r1mega.rollout.publish import Publisher
from r1mega.stages.worker import Worker
from r1mega.weights.blocks import weight_name
from r1mega.weights.engine_names import EngineLayout
from r1mega.weights.local import wire_dtype
from r1mega.weights.names import fp8_weights

_TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}
_FP8_TOLERANCE = 0.2


def open_publisher(worker: Worker, fleet: Fleet | None) -> Publisher:
    """Of this rank of the learner; rank 0 has the fleet."""
    config, learner = worker.config, worker.learner
    fp8 = frozenset(fp8_weights(config.model) if config.rollout.quantization == "fp8" else ())
    team = Team(worker.groups.world, worker.backend.device)
    # The other ranks wait for rank 0 in a collective: it must give up well before them, with one
    # engine that falls silent as with none that comes back.
    timeout_s = config.cluster.collective_timeout_s / 4
    layout = engine_layout(config)

    def itemsize(name: str) -> int:
        if weight_name(name) is not None:
            return torch.float32.itemsize
        return 1 if name in fp8 else wire_dtype(name, learner.weights).itemsize

    return Publisher(
        fleet=fleet,
        carrier=_carrier(worker, team, fp8, layout, timeout_s),
        proof=Proof(
            checksums=Checksums(
                parameters=_parameters(config, layout),
                ranks_per_engine=layout.tp,
                collect=learner.hf_tensors,
                quantized=fp8,
                scope=config.rollout.verify,
                timeout_s=timeout_s,
            ),
            probe=_probe(worker, team),
        ),
        team=team,
        engine_bytes=engine_bytes(config.model, layout, itemsize),
        engine_timeout_s=min(config.rollout.engine_start_timeout_s, 3 * timeout_s),
    )


def _carrier(
    worker: Worker, team: Team, fp8: frozenset[str], layout: EngineLayout, timeout_s: float
) -> Carrier:
    config, learner = worker.config, worker.learner
    match config.rollout.sync:
        case "broadcast":
            return Broadcast(
                lambda: quantized(learner.hf_tensors(), fp8),
                is_root=team.is_root,
                bucket_bytes=config.rollout.sync_bucket_mb << 20,
                ranks_per_engine=layout.tp,
                host=config.cluster.host,
                backend=worker.backend.collective,
                timeout_s=timeout_s,
            )
        case "disk":
            return Disk(
                learner.weights,
                learner.policy_names,
                folder=worker.directory.engine_weights,
                companions=worker.directory.engine_model,
                team=team,
                quantized=fp8,
                ranks_per_engine=layout.tp,
                timeout_s=timeout_s,
            )
        case "p2p":
            return PointToPoint(
                learner.weights,
                layout,
                invite_sglang if config.rollout.engine == "sglang" else invite_embedded,
                team=team,
                bucket_bytes=config.rollout.sync_bucket_mb << 20,
                host=config.cluster.host,
                backend=worker.backend.collective,
                timeout_s=timeout_s,
            )


def _parameters(config: Config, layout: EngineLayout) -> Callable[[int], tuple[Parameter, ...]]:
    """What each rank of an engine holds."""
    on_cpu = config.cluster.backend == "cpu" or config.rollout.engine == "embedded"
    return partial(
        engine_parameters,
        config.model,
        layout,
        dtype=torch.float32 if on_cpu else getattr(torch, engine_dtype(config)),
        checksum=cpu_checksum if on_cpu else cuda_checksum,
    )


def _probe(worker: Worker, team: Team) -> Probe:
    config, layout = worker.config, worker.groups.layout
    rollout, precision = config.rollout, config.learner.precision
    usual = _FP8_TOLERANCE if rollout.quantization == "fp8" else _TOLERANCE[precision]
    return Probe(
        logprobs=worker.learner.logprobs,
        team=team,
        vocab_size=config.model.vocab_size,
        temperature=worker.learner.temperature,
        tolerance=usual if rollout.probe_tolerance is None else rollout.probe_tolerance,
        max_tokens=min(rollout.context_tokens, config.learner.tokens_per_microbatch),
        least_sequences=layout.dp * (layout.pp if layout.vpp else 1),
    )
