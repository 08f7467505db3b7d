"""Publishers of random weights for tests, in place of a learner."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from r1mega.config.schema import Model
from r1mega.model.hf_config import hf_config
from r1mega.parallel.collectives import Team
from r1mega.parallel.layout import Layout
from r1mega.records import Batch, Sequence
from r1mega.rollout import control
from r1mega.rollout.broadcast import Broadcast, Stream
from r1mega.rollout.carrier import Carried, Carrier
from r1mega.rollout.checksum import cpu_checksum
from r1mega.rollout.engine.cache import Cache
from r1mega.rollout.engine.network import Network
from r1mega.rollout.engine.plan import Chunks, plan
from r1mega.rollout.engine.weights import allocate, load
from r1mega.rollout.fleet import EngineHandle, Fleet
from r1mega.rollout.predict import engine_bytes, engine_parameters
from r1mega.rollout.probe import Probe
from r1mega.rollout.proof import Checksums, Proof
from r1mega.rollout.publish import Publisher
from r1mega.weights.engine_names import EngineLayout
from r1mega.weights.local import LocalWeights
from r1mega.weights.regions import indices
from tests.distributed.fleets import MODEL, weights
from tests.distributed.shards import filled_shard

LAYOUT = EngineLayout(fused=False)


@dataclass
class Source:
    """Random weights, others for each seed; called it streams them as a learner does."""

    seed: int = 1
    model: Model = field(default_factory=lambda: MODEL)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return weights(self.seed, self.model)

    def __call__(self) -> Stream:
        return iter(self.tensors.items())

    def collect(self, names: list[str]) -> Stream:
        tensors = self.tensors
        return ((name, tensors[name]) for name in names)

    def logprobs(self, batch: Batch) -> list[tuple[float, ...]]:
        """As a learner would score them, by the embedded engine's network in this process."""
        held = allocate(self.model)
        load(held, self.tensors.items())
        network = Network(self.model, held, 96)
        return [_logprobs(network, sequence) for sequence in batch.sequences]


@torch.inference_mode()
def _logprobs(network: Network, sequence: Sequence) -> tuple[float, ...]:
    cache = Cache(network.model, num_slots=1, num_positions=96, prefix_bytes=0)
    tokens_SP = np.array([sequence.token_ids])
    chunks = Chunks(np.array([0]), np.array([0]), np.array([len(sequence.token_ids)]))
    hidden = network.forward(plan(tokens_SP, chunks), cache)
    rows = torch.arange(sequence.start - 1, len(sequence.token_ids) - 1)
    table = network.logits(hidden, rows)[: len(rows)].log_softmax(-1)
    return tuple(table[torch.arange(len(rows)), tokens_SP[0, sequence.start :]].tolist())


def broadcast(
    stream: Callable[[], Stream], *, is_root: bool = True, timeout_s: float = 60.0
) -> Broadcast:
    """About ten buckets of the model of ``fleets``."""
    return Broadcast(stream, is_root=is_root, bucket_bytes=50_000, timeout_s=timeout_s)


def checksums(
    source: Source,
    scope: Literal["sample", "all"] = "sample",
    quantized: frozenset[str] = frozenset(),
) -> Checksums:
    parameters = partial(
        engine_parameters, source.model, LAYOUT, dtype=torch.float32, checksum=cpu_checksum
    )
    return Checksums(
        parameters=parameters,
        ranks_per_engine=1,
        collect=source.collect,
        quantized=quantized,
        scope=scope,
        timeout_s=30.0,
    )


def probe(source: Source) -> Probe:
    return Probe(
        logprobs=source.logprobs,
        team=Team(),
        vocab_size=source.model.vocab_size,
        temperature=1.0,
        tolerance=1e-4,
    )


def publisher(
    fleet: Fleet | None,
    carrier: Carrier,
    proof: Proof | None = None,
    *,
    team: Team | None = None,
    engine_timeout_s: float = 30.0,
) -> Publisher:
    return Publisher(
        fleet=fleet,
        carrier=carrier,
        proof=Proof() if proof is None else proof,
        team=Team() if team is None else team,
        engine_bytes=engine_bytes(MODEL, LAYOUT, lambda name: 4),
        engine_timeout_s=engine_timeout_s,
    )


@dataclass
class Tampering:
    """A carrier after which engine-1 holds ``changed`` values under the version it was given."""

    carrier: Carrier
    folder: Path
    changed: Callable[[], Mapping[str, Tensor]]

    def carry(self, engines: tuple[EngineHandle, ...], version: int) -> Carried:
        carried = self.carrier.carry(engines, version)
        for engine in engines:
            if engine.name == "engine-1":
                put(engine, self.folder, self.changed())
        return carried

    def abandon(self) -> None:
        self.carrier.abandon()


def put(engine: EngineHandle, folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Have the engine hold ``tensors`` under the version that it names already."""
    folder.mkdir(exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    body = {"model_path": str(folder)}
    control.post(f"{engine.url}/update_weights_from_disk", body, timeout_s=30)


def local_weights(source: Source, layout: Layout, rank: int) -> LocalWeights:
    """What rank ``rank`` of a learner holds, without its network."""
    tensors = source.tensors
    return filled_shard(
        source.model, layout, rank, lambda name, shape, region: tensors[name][indices(region)]
    )


def companions(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config(MODEL)))
    return folder
