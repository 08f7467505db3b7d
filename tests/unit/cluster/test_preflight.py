"""What an environment lacks is said before any process starts."""

from importlib.util import find_spec

import pytest

from r1mega.cluster.errors import JobFailed
from r1mega.cluster.preflight import check_inputs, check_packages
from r1mega.config import Config, Learner

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


def test_a_field_that_megatron_does_not_have_is_named() -> None:
    check_inputs(Config(learner=Learner(megatron={"moe_router_fusion": True})))
    with pytest.raises(JobFailed) as failure:
        check_inputs(Config(learner=Learner(megatron={"moe_router_fusions": True})))
    assert str(failure.value) == (
        "learner.megatron.moe_router_fusions is no field of megatron-core's MLATransformerConfig; "
        "did you mean moe_router_fusion?"
    )
