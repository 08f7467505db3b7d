"""What an environment lacks is said before any process starts."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from r1mega.cluster.errors import JobFailed
from r1mega.cluster.preflight import check_inputs, check_key, check_machines, check_packages
from r1mega.config import Cluster, Config, Learner, load

NEEDS = {
    "transformer_engine": (
        {"layer_spec": "transformer_engine"},
        {"precision_aware_optimizer": True},
        {"optimizer_offload": 0.5},
    ),
    "deep_ep": ({"dispatcher": "flex"},),
}


@pytest.mark.parametrize(
    ("package", "setting"),
    [(package, setting) for package, settings in NEEDS.items() for setting in settings],
)
def test_an_absent_package_is_named_with_the_setting(
    package: str, setting: dict[str, object]
) -> None:
    if find_spec(package) is not None:
        check_packages(Learner(**setting))  # type: ignore[arg-type]
        return
    with pytest.raises(JobFailed) as failure:
        check_packages(Learner(**setting))  # type: ignore[arg-type]
    assert str(failure.value).startswith(f"learner.{next(iter(setting))}")
    assert f"needs the package {package}, which this environment does not have" in str(
        failure.value
    )


def test_the_defaults_need_nothing_more() -> None:
    check_packages(Learner())
    check_inputs(Config())


@pytest.mark.parametrize("field", ["num_layers", "layernorm_epsilon", "moe_router_topk"])
def test_megatron_is_not_told_another_network(field: str) -> None:
    with pytest.raises(JobFailed) as failure:
        check_inputs(Config(learner=Learner(megatron={field: 2})))
    assert str(failure.value).startswith(f"learner.megatron.{field}=2: model.* decides this")


def test_a_field_that_megatron_does_not_have_is_named() -> None:
    check_inputs(Config(learner=Learner(megatron={"moe_router_fusion": True})))
    with pytest.raises(JobFailed) as failure:
        check_inputs(Config(learner=Learner(megatron={"moe_router_fusions": True})))
    assert str(failure.value) == (
        "learner.megatron.moe_router_fusions is no field of megatron-core's MLATransformerConfig; "
        "did you mean moe_router_fusion?"
    )


def test_one_port_cannot_serve_two() -> None:
    with pytest.raises(JobFailed, match=r"router_port are both 10317: choose two ports"):
        check_machines(Cluster(master_port=10317, router_port=10317))


@pytest.mark.parametrize(
    ("key", "limit"),
    [("learner.tokens_per_microbatch", 20), ("model.max_position_embeddings", 21)],
)
def test_a_document_longer_than_what_must_hold_it_is_named(
    key: str, limit: int, tmp_path: Path
) -> None:
    path = tmp_path / "documents.jsonl"
    rows = [{"text": "1+2=3"}, {"text": "1" * 22}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    layers = ["stage.kind=sft", "data.source=text", f"data.path={path}"]
    check_inputs(load([*layers, f"{key}=24"]))
    with pytest.raises(JobFailed, match=rf"jsonl:2 has 24 tokens, which exceeds {key}={limit}"):
        check_inputs(load([*layers, f"{key}={limit}"]))


def test_servers_that_others_reach_need_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("R1MEGA_API_KEY", raising=False)
    check_key("127.0.0.1")
    with pytest.raises(JobFailed, match="set the environment variable R1MEGA_API_KEY"):
        check_key("10.0.0.1")
    monkeypatch.setenv("R1MEGA_API_KEY", "s3cret")
    check_key("10.0.0.1")
