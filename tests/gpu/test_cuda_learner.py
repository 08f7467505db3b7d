"""Each CUDA option of the learner against the plainer one that it replaces.

Not run where there is no GPU. A case trains three steps twice through the command line and compares
the losses: the option must change speed and memory, and nothing else beyond rounding.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from r1mega.config import Model
from r1mega.parallel.layout import Layout
from r1mega.weights.local import LocalWeights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROOT = Path(__file__).parents[2]
BASE = (
    "configs/smoke/base.yaml",
    "stage.steps=3",
    "data.size=640",
    "learner.warmup_steps=0",
    "learner.lr=1e-3",
    "cluster.learner_processes_per_node=1",
    "stage.save_every=-1",
)
CUDA = ("cluster.backend=cuda", "learner.precision=bf16")
ENGINE = (*CUDA, "learner.layer_spec=transformer_engine")
GROUPED = (*ENGINE, "learner.grouped_gemm=true")
AWARE = (*ENGINE, "learner.precision_aware_optimizer=true")
TWO_EXPERT_RANKS = ("cluster.learner_processes_per_node=2", "parallel.ep=2")
# Blockwise fp8 wants every width to be whole blocks of 128.
WIDE = (
    "model.hidden_size=256",
    "model.intermediate_size=512",
    "model.moe_intermediate_size=128",
    "model.q_lora_rank=128",
    "model.kv_lora_rank=128",
    "model.qk_nope_head_dim=64",
    "model.qk_rope_head_dim=64",
    "model.v_head_dim=128",
)
LIKE_BF16 = 2e-2  # the loss, when roundings of bf16 fall otherwise


@dataclass(frozen=True, kw_only=True)
class Case:
    """Layers of an option, those it is compared with, and what both need."""

    option: tuple[str, ...]
    plain: tuple[str, ...]
    relative: float
    packages: tuple[str, ...] = ("transformer_engine",)
    gpus: int = 1
    capability: tuple[int, int] = (8, 0)


def selective(modules: str) -> Case:
    """No arithmetic differs, but attention's backward adds in no fixed order."""
    recompute = ("learner.recompute=selective", f"learner.recompute_modules=[{modules}]")
    return Case(option=(*GROUPED, *recompute), plain=GROUPED, relative=1e-3)


CASES = {
    "local spec, fp32": Case(
        option=("cluster.backend=cuda",), plain=(), relative=1e-4, packages=()
    ),
    "local spec, bf16": Case(option=CUDA, plain=(), relative=LIKE_BF16, packages=()),
    "transformer engine": Case(option=ENGINE, plain=CUDA, relative=LIKE_BF16),
    "grouped gemm": Case(option=GROUPED, plain=ENGINE, relative=LIKE_BF16),
    "fp8": Case(
        option=(*GROUPED, *WIDE, "learner.fp8=blockwise"),
        plain=(*GROUPED, *WIDE),
        relative=5e-2,
        capability=(9, 0),
    ),
    "precision-aware": Case(option=AWARE, plain=ENGINE, relative=1e-3),
    "bf16 moments": Case(option=(*AWARE, "learner.moments=bf16"), plain=ENGINE, relative=LIKE_BF16),
    "bf16 moments and gradients": Case(
        option=(*AWARE, "learner.moments=bf16", "learner.gradients=bf16"),
        plain=ENGINE,
        relative=LIKE_BF16,
    ),
    "offloaded optimizer": Case(
        option=(*ENGINE, "learner.optimizer_offload=1"), plain=ENGINE, relative=1e-3
    ),
    "half offloaded optimizer": Case(
        option=(*ENGINE, "learner.optimizer_offload=0.5"), plain=ENGINE, relative=1e-3
    ),
    "flex dispatcher": Case(
        option=(*GROUPED, *TWO_EXPERT_RANKS, "learner.dispatcher=flex"),
        plain=(*GROUPED, *TWO_EXPERT_RANKS),
        relative=LIKE_BF16,
        packages=("transformer_engine", "deep_ep"),
        gpus=2,
        capability=(9, 0),
    ),
    "full recompute": Case(
        option=(*GROUPED, "learner.recompute=full"), plain=GROUPED, relative=1e-3
    ),
    **{
        f"recomputed {modules}": selective(modules)
        for modules in (
            "core_attn",
            "layernorm",
            "mla_up_proj",
            "mlp",
            "moe",
            "moe_act",
            "shared_experts",
            "layernorm,mla_up_proj,moe_act",
        )
    },
}
RESUMED = {
    "fused adam": ENGINE,
    "precision-aware": (*AWARE, "learner.moments=bf16"),
    "offloaded optimizer": (*ENGINE, "learner.optimizer_offload=1"),
    "half offloaded optimizer": (*ENGINE, "learner.optimizer_offload=0.5"),
}


def losses(root: Path, layers: tuple[str, ...]) -> list[float]:
    """Of every step of SFT through the command line; on CPU unless ``layers`` say cuda."""
    on_cpu = "cluster.backend=cuda" not in layers
    env = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {})
    command = [sys.executable, "-m", "r1mega", "sft", *BASE, f"run.root={root}", *layers]
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = (root / "smoke_base/metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def skip_unless_possible(case: Case) -> None:
    for package in case.packages:
        if find_spec(package) is None:
            pytest.skip(f"needs the package {package}")
    if torch.cuda.device_count() < case.gpus:
        pytest.skip(f"needs {case.gpus} GPUs")
    if torch.cuda.get_device_capability() < case.capability:
        pytest.skip(f"needs compute capability {case.capability}")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", CASES)
def test_an_option_trains_as_the_plainer_way_does(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    skip_unless_possible(case)
    plain = losses(tmp_path / "plain", case.plain)
    assert losses(tmp_path / "option", case.option) == pytest.approx(plain, rel=case.relative)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", RESUMED)
def test_every_optimizer_resumes_where_it_stopped(name: str, tmp_path: Path) -> None:
    layers = (*RESUMED[name], "stage.save_every=2")
    skip_unless_possible(Case(option=layers, plain=(), relative=0))
    straight = losses(tmp_path / "straight", (*layers, "stage.steps=4"))
    losses(tmp_path / "resumed", (*layers, "stage.steps=2"))
    resumed = losses(tmp_path / "resumed", (*layers, "stage.steps=4"))
    # A lost step count or moment moves the weights by whole learning rates.
    assert resumed == pytest.approx(straight, rel=1e-4)


def test_the_reference_is_page_locked_and_swaps_both_ways() -> None:
    live = {"a": torch.randn(1000, 50, device="cuda"), "b": torch.ones(7, device="cuda").bfloat16()}
    weights = LocalWeights(
        model=Model(), layout=Layout(world=1), rank=0, slices=(), tensors=(live,), owners={}
    )
    before = {name: tensor.clone() for name, tensor in live.items()}
    host = weights.copy_to_host()
    assert all(tensor.is_pinned() for tensor in host)
    for tensor in live.values():
        tensor.add_(1)
    weights.swap(host)
    assert all(torch.equal(live[name], before[name]) for name in live)
    weights.swap(host)
    assert all(torch.equal(live[name], before[name] + 1) for name in live)
