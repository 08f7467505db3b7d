"""Recorded experts in the learner: its own change no bit, any others mean the same everywhere.

One launch per world size opens all its layouts, one after the other, in the same processes.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from r1mega.records import Batch, RoutedExperts
from tests.distributed import tiny
from tests.distributed.launch import run_ranks
from tests.distributed.layouts import joined

NUM_LAYERS, TOPK, NUM_EXPERTS = 3, 4, 16
RATE = 1e-2
FULL = {"recompute": "full"}
EXPERTS = {"recompute": "selective", "recompute_modules": ["core_attn", "moe"]}
CASES: dict[int, dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    1: {"single": ({}, {})},
    2: {
        "dp2 ep2": ({"ep": 2}, {}),
        "pp2 vpp2 experts": ({"pp": 2, "vpp": 2}, EXPERTS),
        "cp2": ({"cp": 2}, {}),
    },
    4: {
        "tp2 pp2 ep2": ({"tp": 2, "pp": 2, "ep": 2}, {}),
        "tp2 cp2 ep2 full": ({"tp": 2, "cp": 2, "ep": 2}, FULL),
        "dp2 pp2 of 3 and 1 full": (
            {"pp": 2, "layers_in_first_stage": 3, "layers_in_last_stage": 1},
            FULL,
        ),
    },
}
NAMES = [(world, name) for world, cases in CASES.items() for name in cases]

Experts = dict[str, Tensor]  # uid -> [tokens - 1, MoE layers, topk]


def other_experts(batch: Batch) -> Experts:
    """Any experts, in any order, across all groups; some more often than others."""
    g = torch.Generator().manual_seed(11)
    favour = torch.linspace(0.0, 0.5, NUM_EXPERTS)
    shapes = {s.uid: (len(s.token_ids) - 1, NUM_LAYERS, NUM_EXPERTS) for s in batch.sequences}
    return {
        uid: (torch.rand(shape, generator=g) + favour).argsort(-1)[..., :TOPK]
        for uid, shape in shapes.items()
    }


def replaying(batch: Batch, experts: Experts, *, holder: int | None = None) -> Batch:
    """The batch with ``experts``, each sequence's on one rank only (or all on ``holder``)."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    sequences = []
    for i, s in enumerate(batch.sequences):
        held = None
        if rank == (i % world if holder is None else holder):
            ids = experts[s.uid].to(torch.uint8).numpy().tobytes()
            held = RoutedExperts(dtype="uint8", ids=ids)
        sequences.append(replace(s, routed_experts=held))
    return Batch(tuple(sequences), replays_routing=True)


class Recorder:
    """Stands between a router and its guide and keeps what is chosen."""

    def __init__(self, router: Any) -> None:
        self.chosen: list[Tensor] = []
        self._guide = router.router_replay
        router.router_replay = self

    def get_replay_topk(self, *args: Any) -> tuple[Tensor, Tensor]:
        values, ids = self._guide.get_replay_topk(*args)
        self.chosen.append(ids)
        return values, ids


def own_experts(learner: Any, batch: Batch) -> Experts:
    """What the routers of a single process choose, in their order; adds up over calls."""
    routers = [m for m in learner.chunks[0].modules() if hasattr(m, "router_replay")]
    guides = [router.router_replay for router in routers]
    recorders = [Recorder(router) for router in routers]
    learner.logprobs(batch)
    for router, guide in zip(routers, guides, strict=True):
        router.router_replay = guide
    experts = {}
    microbatches = learner.microbatches(batch, learner.pack(batch))
    for number, microbatch in enumerate(microbatches):
        chosen = torch.stack([recorder.chosen[number] for recorder in recorders], dim=1)
        starts = microbatch.packed.cu_seqlens_q.tolist()
        for index, start in zip(microbatch.indices, starts, strict=False):
            s = batch.sequences[index]
            experts[s.uid] = chosen[start : start + len(s.token_ids) - 1]
    return experts


def save_experts(path: Path, experts: Experts) -> None:
    path.write_bytes(msgspec.msgpack.encode({uid: ids.tolist() for uid, ids in experts.items()}))


def load_experts(path: Path) -> Experts:
    lists = msgspec.msgpack.decode(path.read_bytes())
    return {uid: torch.tensor(ids) for uid, ids in lists.items()}


def step_facts(learner: Any, batch: Batch) -> dict[str, Any]:
    """Log-probs, metrics and the bits of all gradients; no weight changes."""
    from r1mega.algorithms.losses import ClippedSurrogate

    logprobs = learner.logprobs(batch)
    loss = ClippedSurrogate(clip_low=0.2, clip_high=0.2, kl_coef=0.1, importance_cap=2.0)
    metrics = learner.update(batch, loss, lr=0.0)
    gradients = [p.main_grad.numpy().tobytes() for c in learner.chunks for p in c.parameters()]
    return {
        "logprobs": logprobs,
        "metrics": metrics,
        "gradients": hashlib.sha256(b"".join(gradients)).hexdigest(),
    }


def gradients(learner: Any, batch: Batch) -> dict[str, list[float]]:
    """Of the next-token loss, under Hugging Face names; overwrites the weights."""
    from r1mega.algorithms.losses import next_token_loss

    for chunk in learner.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    learner._run(learner.microbatches(batch, learner.pack(batch)), next_token_loss)
    with torch.no_grad():
        for chunk in learner.chunks:
            for parameter in chunk.parameters():
                parameter.copy_(parameter.main_grad)
    return {
        name: tensor.flatten().tolist()
        for name, tensor in learner.hf_tensors()
        if tensor is not None and not name.endswith("e_score_correction_bias")
    }


def biases(learner: Any) -> list[list[float]]:
    """Of every MoE layer, on rank 0."""
    found = {
        name: tensor.tolist()
        for name, tensor in learner.hf_tensors()
        if tensor is not None and name.endswith("e_score_correction_bias")
    }
    return [found[name] for name in sorted(found)]


def refusals(learner: Any, batch: Batch, experts: Experts) -> list[str]:
    """What is said when the ids of the last sequence are another model's, and when it has none."""
    replayed = replaying(batch, experts)
    *others, last = replayed.sequences
    said = []
    for wrong in (RoutedExperts(dtype="uint8", ids=bytes(7)), None):
        sequences = (*others, replace(last, routed_experts=wrong))
        with pytest.raises(ValueError, match=last.uid) as caught:
            learner.logprobs(replace(replayed, sequences=sequences))
        said.append(str(caught.value))
    return said


def layout_facts(init: str, folder: str, axes: Any, settings: Any) -> dict[str, Any]:
    """One layout: a step without replay, with the learner's own experts, and with others."""
    model = tiny.with_init(Path(init))
    learner = tiny.tiny_learner(model=model, settings=replace(tiny.SETTINGS, **settings), **axes)
    batch, own = tiny.random_batch(), Path(folder, "own")
    if not own.exists():
        save_experts(own, own_experts(learner, batch))
    others = other_experts(batch)
    found = {
        "free": step_facts(learner, batch),
        "own": step_facts(learner, replaying(batch, load_experts(own))),
        "other": step_facts(learner, replaying(batch, others)),
        "refused": refusals(learner, batch, others) if learner.groups.layout.world == 1 else [],
    }
    moving = replace(tiny.SETTINGS, expert_bias_update_rate=RATE, **settings)
    learner = tiny.tiny_learner(model=model, settings=moving, groups=learner.groups)
    before = biases(learner)
    step_facts(learner, replaying(batch, others))
    return {
        **found,
        "bias": [before, biases(learner)],
        "gradients": gradients(learner, replaying(batch, others, holder=0)),
    }


def facts(init: str, folder: str, cases: dict[str, Any]) -> dict[str, Any]:
    """Runs on every rank."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, world, is_master=rank == 0)
    found = {}
    for name, (axes, settings) in cases.items():
        with joined(dist.PrefixStore(name, store), rank, world):
            found[name] = layout_facts(init, folder, axes, settings)
    return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("hf")
    return folder, tiny.transformers_model(tiny.MODEL, folder)


@pytest.fixture(scope="module")
def found(
    checkpoint: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], list[dict[str, Any]]]:
    """What every rank of a world found, launched once; the single process comes first."""
    folder = tmp_path_factory.mktemp("experts")
    worlds: dict[int, list[dict[str, Any]]] = {}

    def launch(world: int) -> list[dict[str, Any]]:
        if world not in worlds:
            worlds[world] = run_ranks(
                __name__,
                "facts",
                world=world,
                timeout_s=600,
                init=str(checkpoint[0]),
                folder=str(folder),
                cases=CASES[world],
            )
        return worlds[world]

    launch(1)
    return launch


@pytest.mark.parametrize(("world", "name"), NAMES)
def test_own_experts_change_no_bit(world: int, name: str, found: Any) -> None:
    for ranks in found(world):
        free, own = ranks[name]["free"], ranks[name]["own"]
        assert own["logprobs"] == free["logprobs"]
        assert own["gradients"] == free["gradients"]
        assert own["metrics"]["mismatch/routing"] == 0.0
        for key in ("loss", "learner/grad_norm", "policy/kl", "mismatch/kl"):
            assert own["metrics"][key] == free["metrics"][key], key


@pytest.mark.parametrize(("world", "name"), NAMES[1:])
def test_other_experts_mean_the_same_everywhere(world: int, name: str, found: Any) -> None:
    alone = found(1)[0]["single"]["other"]
    assert alone["metrics"]["mismatch/routing"] > 0.99  # 1 of 1820 sets would be the same
    for ranks in found(world):
        facts = ranks[name]["other"]
        for mine, reference in zip(facts["logprobs"], alone["logprobs"], strict=True):
            assert mine == pytest.approx(reference, abs=1e-5)
        for key in ("loss", "learner/grad_norm", "policy/kl", "mismatch/kl", "mismatch/routing"):
            assert facts["metrics"][key] == pytest.approx(alone["metrics"][key], rel=1e-5), key
    assert found(world)[0][name]["bias"] == found(1)[0]["single"]["bias"]


def test_the_load_counts_the_experts_used(found: Any) -> None:
    """Where the sequences' last tokens, which route freely, cannot change the outcome."""
    batch = tiny.random_batch()
    ids = torch.cat(list(other_experts(batch).values()))
    before, after = (torch.tensor(bias) for bias in found(1)[0]["single"]["bias"])
    free = len(batch.sequences)
    num_checked = 0
    for layer in range(NUM_LAYERS):
        counts = ids[:, layer].flatten().bincount(minlength=NUM_EXPERTS)
        ahead = (len(ids) + free) * TOPK / NUM_EXPERTS - counts
        sure = (ahead < 0) | (ahead > free)
        moved = (after - before)[layer][sure]
        assert moved.tolist() == pytest.approx((RATE * ahead[sure].sign()).tolist(), abs=1e-6)
        num_checked += int(sure.sum())
    assert num_checked > 0.8 * NUM_LAYERS * NUM_EXPERTS


def test_ids_that_are_missing_or_of_another_model_are_refused(found: Any) -> None:
    foreign, missing = found(1)[0]["single"]["refused"]
    assert "comes with 7 expert ids of uint8, but the model routes (" in foreign
    assert "comes without the experts it was routed to" in missing


def forced(network: Any, batch: Batch, experts: Experts) -> Any:
    """transformers' network with routers that choose ``experts`` and weigh as ever."""
    uids = {s.token_ids: s.uid for s in batch.sequences}
    gates = [layer.mlp.gate for layer in network.model.layers if hasattr(layer.mlp, "gate")]
    chosen: dict[Any, Tensor] = {}

    def choose(_: Any, args: tuple[Tensor]) -> None:
        ids = experts[uids[tuple(args[0][0].tolist())]]
        ids = torch.cat([ids, ids[-1:]])  # the last token predicts nothing
        chosen.update(zip(gates, ids.unbind(1), strict=True))

    def weigh(gate: Any, args: tuple[Tensor], output: Any) -> tuple[Tensor, Tensor, Tensor]:
        scores = output[0].float().sigmoid().gather(1, chosen[gate])
        weights = scores / (scores.sum(-1, keepdim=True) + 1e-20) * gate.routed_scaling_factor
        return output[0], weights, chosen[gate]

    network.register_forward_pre_hook(choose)
    for gate in gates:
        gate.register_forward_hook(weigh)
    return network


@pytest.mark.parametrize(("world", "name"), [(1, "single"), (4, "tp2 pp2 ep2")])
def test_other_experts_mean_the_same_in_transformers(
    world: int, name: str, found: Any, checkpoint: Any
) -> None:
    from transformers import AutoModelForCausalLM

    batch = tiny.random_batch()
    network = AutoModelForCausalLM.from_pretrained(checkpoint[0], attn_implementation="eager")
    network = forced(network.float().eval(), batch, other_experts(batch))
    mine = found(world)[0][name]
    for s, row in zip(batch.sequences, mine["other"]["logprobs"], strict=True):
        with torch.no_grad():
            table = network(torch.tensor([s.token_ids])).logits[0].log_softmax(-1)
        targets = torch.tensor(s.token_ids[s.start :])
        rows = torch.arange(s.start - 1, len(s.token_ids) - 1)
        assert row == pytest.approx(table[rows, targets].tolist(), abs=1e-5)
    theirs = tiny.transformers_gradients(network, batch)
    assert mine["gradients"].keys() == theirs.keys()
    for parameter, gradient in mine["gradients"].items():
        expected = theirs[parameter].flatten()
        difference = (torch.tensor(gradient) - expected).abs().max()
        assert difference <= 1e-5 * expected.abs().max(), parameter
