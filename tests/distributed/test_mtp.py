"""MTP layers equal the paper's equations on transformers' modules; in RL they leave the policy be.

transformers runs no MTP layers; the reference here is written from DeepSeek-V3's report (arXiv
2412.19437, eq. 21-25), with what its published weights settle: the embedding comes first in the
projection, and the trunk's hidden state has passed the final norm.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from r1mega.records import Batch
from tests.distributed import tiny
from tests.distributed.launch import run_ranks

MODEL = replace(tiny.MODEL, num_nextn_predict_layers=2)
WEIGHT = 0.3
SETTINGS = replace(tiny.SETTINGS, adam_eps=1e-3, mtp_loss_weight=WEIGHT)
LAYOUTS: dict[str, dict[str, Any]] = {
    "single": {"world": 1},
    "tp2 pp2 ep2, recomputed": {"world": 4, "tp": 2, "pp": 2, "ep": 2, "recompute": "full"},
}


def add_layers(network: Any) -> None:
    """Give transformers' network MTP layers under the names of the published checkpoint."""
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek_v3

    config = network.config
    for depth in range(MODEL.num_nextn_predict_layers):
        layer = deepseek_v3.DeepseekV3DecoderLayer(config, config.num_hidden_layers + depth)
        norm = deepseek_v3.DeepseekV3RMSNorm
        layer.enorm = norm(config.hidden_size, eps=config.rms_norm_eps)
        layer.hnorm = norm(config.hidden_size, eps=config.rms_norm_eps)
        layer.eh_proj = torch.nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        layer.shared_head = torch.nn.ModuleDict(
            {"norm": norm(config.hidden_size, eps=config.rms_norm_eps)}
        )
        network.model.layers.append(layer.eval())


def ahead(network: Any, token_ids: tuple[int, ...]) -> list[torch.Tensor]:
    """Of every depth d the log-probs [T - d, V] of the token 1 + d further on than each."""
    tokens = torch.tensor([token_ids])
    hidden = network.model(tokens).last_hidden_state
    tables = []
    for depth, layer in enumerate(network.model.layers[MODEL.num_hidden_layers :], start=1):
        embedded = network.model.embed_tokens(tokens[:, depth:])
        length = embedded.shape[1]
        joined = torch.cat([layer.enorm(embedded), layer.hnorm(hidden[:, :length])], dim=-1)
        positions = torch.arange(length)[None]
        mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        x = layer.eh_proj(joined)
        rotary = network.model.rotary_emb(x, positions)
        x = layer(x, attention_mask=mask, position_embeddings=rotary)
        hidden = layer.shared_head["norm"](x)
        tables.append(network.lm_head(hidden)[0].log_softmax(-1))
    return tables


def mtp_loss(network: Any, batch: Batch) -> torch.Tensor:
    loss = torch.zeros(())
    for s in batch.sequences:
        for depth, table in enumerate(ahead(network, s.token_ids), start=1):
            first = max(s.start, 1 + depth)
            targets = torch.tensor(s.token_ids[first:])
            rows = torch.arange(first, len(s.token_ids)) - 1 - depth
            loss = loss - s.weight * table[rows, targets].sum()
    return loss / MODEL.num_nextn_predict_layers


def joint_loss(network: Any, batch: Batch) -> torch.Tensor:
    return tiny.next_token_loss(network, batch) + WEIGHT * mtp_loss(network, batch)


def joint_facts(init: str, recompute: str = "none", **axes: Any) -> dict[str, Any]:
    """Runs on every rank: gradients, and metrics and weights of two updates."""
    from r1mega.algorithms.losses import next_token_loss

    settings = replace(SETTINGS, recompute=recompute)
    model = replace(MODEL, init=init)
    learner = tiny.tiny_learner(model=model, settings=settings, mtp="joint", **axes)
    return {
        "gradients": tiny.gradients(learner),
        "metrics": [
            learner.update(tiny.random_batch(seed=seed), next_token_loss, lr=1e-3)
            for seed in (3, 4)
        ],
        "updated": tiny.weights(learner),
    }


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("hf")
    return folder, tiny.transformers_model(MODEL, folder, add_layers)


@pytest.fixture(scope="module")
def joint(network: tuple[Path, Any]) -> dict[str, dict[str, Any]]:
    return {
        layout: run_ranks(__name__, "joint_facts", init=str(network[0]), **axes)[0]
        for layout, axes in LAYOUTS.items()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_gradients_equal_the_equations(layout: str, joint: Any, network: Any) -> None:
    batch = tiny.random_batch()
    with torch.no_grad():
        expected = mtp_loss(network[1], batch).item()
        policy = tiny.next_token_loss(network[1], batch).item()
    first = joint[layout]["metrics"][0]
    assert first["mtp/loss"] == pytest.approx(expected, rel=1e-5)
    assert first["loss"] == pytest.approx(policy, rel=1e-5)
    theirs = tiny.transformers_gradients(network[1], batch, joint_loss)
    tiny.assert_close(joint[layout]["gradients"], theirs)


def test_updates_equal_a_single_process(joint: Any) -> None:
    mine, single = joint["tp2 pp2 ep2, recomputed"], joint["single"]
    for key in ("loss", "mtp/loss", "learner/grad_norm"):
        expected = [step[key] for step in single["metrics"]]
        assert [step[key] for step in mine["metrics"]] == pytest.approx(expected, rel=1e-5), key
    tiny.assert_close(mine["updated"], single["updated"])


def rl_facts(init: str, recompute: str = "none", **axes: Any) -> dict[str, Any]:
    """Runs on every rank: GRPO updates without, then with MTP layers beside the policy."""
    from r1mega.algorithms.losses import ClippedSurrogate

    loss = ClippedSurrogate(clip_low=0.2, clip_high=0.2, kl_coef=0.1)
    settings = replace(SETTINGS, clip_grad=0.1, expert_bias_update_rate=1e-3, recompute=recompute)
    facts, groups = {}, None
    for mtp in ("none", "detached"):
        learner = tiny.tiny_learner(
            model=replace(MODEL, init=init), settings=settings, mtp=mtp, groups=groups, **axes
        )
        groups = learner.groups
        batches = [tiny.random_batch(seed=seed) for seed in (3, 4)]
        facts[mtp] = {
            "before": tiny.weights(learner),
            "metrics": [learner.update(batch, loss, lr=1e-3) for batch in batches],
            "updated": tiny.weights(learner),
            "published": [name for name, _ in learner.hf_tensors()],
        }
    return facts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_rl_the_policy_is_trained_as_without_mtp_layers(layout: str, network: Any) -> None:
    """Bit for bit, clipping of the gradient included; the MTP layers learn."""
    facts = run_ranks(__name__, "rl_facts", init=str(network[0]), **LAYOUTS[layout])[0]
    without, beside = facts["none"], facts["detached"]
    for step, other in zip(without["metrics"], beside["metrics"], strict=True):
        assert step["learner/grad_norm"] > 0.1  # it is clipped
        for key in ("loss", "learner/grad_norm", "policy/entropy"):
            assert step[key] == other[key]
    assert {name: beside["updated"][name] for name in without["updated"]} == without["updated"]
    assert without["updated"]["lm_head.weight"] != without["before"]["lm_head.weight"]
    layers = [name for name in beside["updated"] if name not in without["updated"]]
    moved = [name for name in layers if beside["updated"][name] != beside["before"][name]]
    assert moved == layers
    assert beside["metrics"][1]["mtp/loss"] < beside["metrics"][0]["mtp/loss"] * 1.1
    assert beside["published"] == without["published"]
