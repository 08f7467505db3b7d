"""A configuration in small passes the checks, fits the machine and keeps what is to be tested."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Literal

from hypothesis import given
from hypothesis import strategies as st

from r1mega.config import (
    Cluster,
    Config,
    Model,
    Parallel,
    Stage,
    derived,
    load,
    network,
)
from r1mega.config.checks import check
from r1mega.config.scaled import changes, scale_down

CONFIGS = Path(__file__).parents[3] / "configs"
V3_ON_256 = ["stage/r1_zero.yaml", "model/deepseek_v3.yaml", "cluster/h100x256.yaml"]


def layers(*names: str) -> list[str]:
    return [str(CONFIGS / name) if name.endswith(".yaml") else name for name in names]


def small(config: Config, *, processes: int = 8, cuda: bool = False) -> Config:
    scaled = scale_down(config, processes=processes, cuda=cuda, root="elsewhere")
    check(scaled)
    assert derived.world_size(scaled.cluster) <= processes
    return scaled


def test_deepseek_v3_on_256_gpus_becomes_eight_processes() -> None:
    config = load(layers(*V3_ON_256))
    scaled = small(config)
    p, m = scaled.parallel, scaled.model
    assert (p.tp, p.pp, p.cp, p.ep, p.etp) == (2, 2, 1, 4, 1)
    assert derived.data_parallel_size(scaled.cluster, p) == 2
    assert derived.layers_per_stage(m.num_hidden_layers, p) == (4, 2)  # uneven, as it was
    assert (m.first_k_dense_replace, m.n_group, m.topk_group, m.num_experts_per_tok) == (1, 4, 2, 4)
    assert m.q_lora_rank is not None
    assert m.rope_scaling is not None
    assert (scaled.learner.recompute, scaled.learner.overlap_grad_reduce) == ("full", True)
    assert (scaled.learner.layer_spec, scaled.learner.dispatcher) == ("local", "alltoall")
    told = list(changes(config, scaled))
    assert told[0].startswith("parallel: tp 8 -> 2, pp 12 -> 2, ep 16 -> 4")
    assert "n_routed_experts 256 -> 8" in told[1]
    assert "layer_spec transformer_engine -> local" in told[2]


def test_on_gpus_it_keeps_what_needs_them_and_starts_no_engine() -> None:
    scaled = small(load(layers(*V3_ON_256)), cuda=True)
    assert (scaled.learner.layer_spec, scaled.learner.dispatcher) == ("transformer_engine", "flex")
    assert (scaled.learner.precision, scaled.learner.grouped_gemm) == ("bf16", True)
    assert (scaled.cluster.backend, scaled.stage.kind) == ("cuda", "sft")
    alone = small(load(layers(*V3_ON_256)), processes=1, cuda=True)
    assert alone.learner.dispatcher == "alltoall"  # nobody to exchange with


def test_a_tiny_layout_stays_as_it_is() -> None:
    axes = ["parallel.tp=2", "parallel.pp=2", "parallel.ep=2", "learner.precision=fp32"]
    config = load(layers("model/tiny_moe.yaml", *axes, "cluster.learner_processes_per_node=4"))
    scaled = small(config)
    assert scaled.parallel == config.parallel
    assert scaled.model.num_hidden_layers == config.model.num_hidden_layers
    assert list(changes(config, scaled)) == []
    assert scaled.stage.kind == "rl"


def test_dense_networks_keep_grouped_queries_and_tied_embeddings() -> None:
    config = load(
        [
            "model.architecture=qwen2",
            "model.num_attention_heads=16",
            "model.num_key_value_heads=2",
            "model.tie_word_embeddings=true",
            "parallel.tp=4",
            "cluster.learner_processes_per_node=4",
        ]
    )
    scaled = small(config)
    assert scaled.parallel.tp == 4
    assert scaled.model.num_attention_heads == 4
    assert network.key_value_heads(scaled.model) == 2  # still fewer than tp
    assert scaled.model.tie_word_embeddings


def test_only_what_selective_recompute_can_do_without_a_gpu_remains() -> None:
    recompute = ["learner.recompute=selective", "learner.recompute_modules=[layernorm,mlp]"]
    needed = ["learner.layer_spec=transformer_engine", "cluster.backend=cuda", "stage.kind=sft"]
    assert small(load([*recompute, *needed])).learner.recompute_modules == ["mlp"]


@st.composite
def parallels(draw: st.DrawFn) -> tuple[Parallel, int, int]:
    """A layout, its replicas and the layers it takes."""
    tp, cp, dp = (draw(st.integers(1, most)) for most in (9, 3, 5))
    pp = draw(st.integers(1, 9))
    vpp = draw(st.sampled_from([None, 2, 3])) if pp > 1 else None
    uneven = st.sampled_from([None, 6, 12]) if pp > 2 else st.none()
    first, last = draw(uneven), draw(uneven)
    middle = pp - (first is not None) - (last is not None)
    ranks = tp * cp * dp
    ep = draw(st.sampled_from([n for n in range(1, ranks + 1) if ranks % n == 0]))
    etp = draw(st.sampled_from([n for n in range(1, ranks // ep + 1) if ranks // ep % n == 0]))
    axes = Parallel(
        tp=tp,
        pp=pp,
        vpp=vpp,
        cp=cp,
        ep=ep,
        etp=etp,
        layers_in_first_stage=first,
        layers_in_last_stage=last,
    )
    return axes, dp, (first or 0) + (last or 0) + 6 * middle


@given(parallels(), st.sampled_from(["deepseek_v3", "qwen2"]), st.integers(1, 9), st.booleans())
def test_every_layout_has_a_valid_small_one(
    layout: tuple[Parallel, int, int],
    architecture: Literal["deepseek_v3", "qwen2"],
    processes: int,
    cuda: bool,
) -> None:
    p, dp, num_layers = layout
    dense = architecture == "qwen2"
    size = 16 * 9 * 5 * 7 * math.lcm(p.ep, p.etp)
    model = Model(
        architecture=architecture,
        num_hidden_layers=num_layers,
        num_attention_heads=size,
        hidden_size=16 * size,
        intermediate_size=size,
        vocab_size=size,
        **({} if dense else {"n_routed_experts": size, "moe_intermediate_size": size}),
    )
    config = Config(
        parallel=replace(p, ep=1, etp=1) if dense else p,
        model=model,
        cluster=Cluster(learner_processes_per_node=p.tp * p.pp * p.cp * dp),
        stage=Stage(kind="sft"),
    )
    check(config)
    scaled = small(config, processes=processes, cuda=cuda)
    axes = ("tp", "pp", "cp", "ep", "etp")
    assert all(getattr(scaled.parallel, a) <= getattr(config.parallel, a) for a in axes)
