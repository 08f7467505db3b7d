"""bf16 with fp32 masters, and recomputation: what they may change, and what they must not."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.distributed import tiny
from tests.distributed.launch import run_ranks

BF16 = replace(tiny.SETTINGS, precision="bf16")
UPDATES = 48
SMALL_LR = 1e-5  # the spacing of bf16 around the weights' 0.08 is 5e-4
TP2_PP2_EP2 = {"tp": 2, "pp": 2, "ep": 2}
MODULES = [["core_attn"], ["mla_up_proj"], ["mlp"], ["moe"], ["shared_experts"]]


def small_steps() -> dict[str, Any]:
    """Runs on one rank: what many updates below bf16's resolution do."""
    from r1mega.algorithms.losses import next_token_loss
    from r1mega.learner.optimizer import optimizer_state

    learner = tiny.tiny_learner(settings=BF16)
    exact = tiny.tiny_learner(groups=learner.groups)
    batch = tiny.random_batch()
    first = _bf16(learner)
    shares, rounded, losses = [], [], []
    for _ in range(UPDATES):
        metrics = learner.update(batch, next_token_loss, lr=SMALL_LR)
        losses.append((metrics["loss"], exact.update(batch, next_token_loss, lr=SMALL_LR)["loss"]))
        masters = _masters(optimizer_state(learner.optimizer, learner.chunks))
        weights = _bf16(learner)
        rounded.append(torch.equal(weights, masters.bfloat16()))
        shares.append((_share(weights != first), _share(masters != first.float())))
    return {"losses": losses, "rounded": rounded, "shares": shares}


def _bf16(learner: Any) -> torch.Tensor:
    """All weights, flat."""
    named = dict(learner.chunks[0].named_parameters())
    return torch.cat([named[name].detach().flatten().clone() for name in sorted(named)])


def _masters(state: dict[str, torch.Tensor]) -> torch.Tensor:
    """All of them, flat and in the same order: one rank owns every range."""
    names = sorted(name for name in state if name.endswith("/param"))
    return torch.cat([state[name] for name in names])


def _share(marks: torch.Tensor) -> float:
    return marks.float().mean().item()


def training(settings: dict[str, Any], axes: dict[str, int]) -> list[dict[str, float]]:
    """Runs on every rank: three updates."""
    from r1mega.algorithms.losses import next_token_loss

    learner = tiny.tiny_learner(settings=replace(tiny.SETTINGS, **settings), **axes)
    batch = tiny.random_batch()
    return [learner.update(batch, next_token_loss, lr=1e-3) for _ in range(3)]


def recomputed() -> list[dict[str, Any]]:
    """Runs on every rank: gradients and forward passes of each kind of recomputation."""
    plain = tiny.tiny_learner(tp=2)
    facts = [_passes(plain)]
    for modules in MODULES:
        settings = replace(tiny.SETTINGS, recompute="selective", recompute_modules=modules)
        facts.append(_passes(tiny.tiny_learner(settings=settings, groups=plain.groups)))
    return facts


def _passes(learner: Any) -> dict[str, Any]:
    """The gradients, and how often each kind of module ran."""
    counts: Counter[str] = Counter()

    def count(module: torch.nn.Module, *_: Any) -> None:
        counts[type(module).__name__] += 1

    for module in learner.chunks[0].modules():
        module.register_forward_pre_hook(count)
    return {"gradients": tiny.gradients(learner), "counts": counts}


def test_updates_below_the_resolution_of_bf16_add_up() -> None:
    (facts,) = run_ranks(__name__, "small_steps", world=1)
    assert all(facts["rounded"])  # weights are their masters, rounded
    (changed, moved), (changed_at_last, _) = facts["shares"][0], facts["shares"][-1]
    assert changed < 0.06  # one update moves hardly any weight
    assert moved > 0.8  # but the masters of all that have a gradient
    assert changed_at_last > 0.4  # and so nothing is lost
    (first, exact_first), (last, exact_last) = facts["losses"][0], facts["losses"][-1]
    assert first - last == pytest.approx(exact_first - exact_last, rel=0.2)


def test_layouts_agree_within_bf16() -> None:
    settings = {"precision": "bf16"}
    (single,) = run_ranks(__name__, "training", world=1, settings=settings, axes={})
    cut = run_ranks(__name__, "training", world=4, settings=settings, axes=TP2_PP2_EP2)[0]
    for mine, theirs in zip(cut, single, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=2**-8)
        # Rounding also chooses some experts otherwise, and what they learn.
        assert mine["learner/grad_norm"] == pytest.approx(theirs["learner/grad_norm"], rel=0.06)


def test_recomputation_changes_no_bit_of_a_gradient() -> None:
    plain, *others = run_ranks(__name__, "recomputed", world=2)[0]
    runs = {
        "core_attn": "CoreAttention",
        "mlp": "MLP",
        "moe": "TopKRouter",
        "shared_experts": "SharedExpertMLP",
    }
    for (module,), facts in zip(MODULES, others, strict=True):
        assert facts["gradients"] == plain["gradients"], module
        if module in runs:
            name = runs[module]
            assert facts["counts"][name] > plain["counts"][name] > 0, module
