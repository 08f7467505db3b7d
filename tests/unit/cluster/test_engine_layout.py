"""The flags of a server decide how weights are cut for it."""

import pytest

from r1mega.cluster.engine_layout import engine_layout
from r1mega.config.schema import Cluster, Config, Rollout
from r1mega.weights.engine_names import EngineLayout


def layout(*arguments: str, gpus: int = 8, **rollout: str) -> EngineLayout:
    settings = {"engine": "sglang", **rollout}
    return engine_layout(
        Config(
            name="x",
            cluster=Cluster(backend="cuda", gpus_per_engine=gpus),
            rollout=Rollout(sglang_args=list(arguments), **settings),
        )
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", EngineLayout(tp=8)),
        ("--ep-size 4 --context-length 32", EngineLayout(tp=8, ep=4)),
        ("--tp=16 --expert-parallel-size=8", EngineLayout(tp=16, ep=8)),
        (
            "--dp 8 --enable-dp-attention --enable-dp-lm-head --moe-dense-tp-size 1",
            EngineLayout(tp=8, dp=8, dp_head=True, dense_replicated=True),
        ),
        ("--attn-dp-size 2", EngineLayout(tp=8, dp=2)),
        # With an exchange of tokens SGLang sets ep to tp.
        ("--moe-a2a-backend deepep", EngineLayout(tp=8, ep=8, shared_replicated=True)),
    ],
)
def test_flags(arguments: str, expected: EngineLayout):
    assert layout(*arguments.split()) == expected


def test_fp8_and_the_embedded_engine():
    assert layout(quantization="fp8") == EngineLayout(tp=8, quantized=True)
    assert layout(engine="embedded") == EngineLayout(fused=False)
