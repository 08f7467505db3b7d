"""Every YAML under configs/ loads, on the layers it needs, and says what its source says."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from r1mega.config import Config, load

ROOT = Path(__file__).parents[3]
DATA = Path(os.environ.get("R1MEGA_DATA", ROOT / "../shared/data"))

R1_ZERO = "configs/stage/r1_zero.yaml"
V3 = "configs/model/deepseek_v3.yaml"
TINY = "configs/model/tiny_moe.yaml"
H100 = "configs/cluster/h100x256.yaml"
DENSE = ("tiny_qwen2", "qwen2_5_math_1_5b", "qwen2_5_math_7b", "llama_3_1_8b")

# What each file is laid on: a model or a cluster alone is not a run.
LAYERS = {
    R1_ZERO: [R1_ZERO, TINY],
    V3: [V3, R1_ZERO],
    TINY: [TINY],
    **{(file := f"configs/model/{name}.yaml"): [file] for name in DENSE},
    H100: [R1_ZERO, V3, H100],
    "configs/cluster/cpu.yaml": ["configs/cluster/cpu.yaml"],
    "configs/cluster/smoke_8gpu.yaml": [R1_ZERO, TINY, "configs/cluster/smoke_8gpu.yaml"],
    "configs/smoke/base.yaml": ["configs/smoke/base.yaml"],
    "configs/smoke/r1_zero.yaml": ["configs/smoke/r1_zero.yaml"],
    "configs/smoke/gsm8k.yaml": ["configs/smoke/gsm8k.yaml", "data.path=train.jsonl"],
}
FILES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("configs/**/*.yaml"))


def _load(*layers: str) -> Config:
    return load([str(ROOT / layer) if layer.endswith(".yaml") else layer for layer in layers])


@pytest.mark.parametrize("file", FILES)
def test_every_yaml_loads(file: str) -> None:
    # A file that this table does not know is a run of its own.
    _load(*LAYERS.get(file, [file]))


def test_r1_zero_holds_the_constants_of_the_paper() -> None:
    config = _load(R1_ZERO, V3)
    assert config.learner.lr == 3e-6
    assert config.algorithm.kl_coef == 0.001
    assert (config.algorithm.clip_low, config.algorithm.clip_high) == (10.0, 10.0)
    assert config.rollout.temperature == 1.0
    assert (config.algorithm.group_size, config.algorithm.prompts_per_step) == (16, 32)
    assert config.rollout.steps == 16
    assert config.rollout.max_response_tokens == 32_768
    assert config.rollout.max_response_tokens_later == 65_536
    assert config.rollout.later_from_step == 8_200
    assert config.algorithm.reference_refresh_steps == 400
    assert config.stage.steps == 10_400
    assert (config.rewards.accuracy, config.rewards.format) == (1.0, 1.0)
    assert (config.algorithm.ratio, config.algorithm.normalize) == ("token", "sample")


def test_deepseek_v3_is_the_published_network() -> None:
    published_file = DATA / "deepseek_v3/hf_config_deepseek_v3_671B.json"
    if not published_file.exists():
        pytest.skip(f"needs {published_file}")
    published = json.loads(published_file.read_text())
    model = asdict(_load(V3, R1_ZERO).model)
    scaling = model.pop("rope_scaling")
    shared = {key for key, value in model.items() if value is not None} & published.keys()
    assert len(shared) >= 25
    assert {key: model[key] for key in shared} == {key: published[key] for key in shared}
    theirs = published["rope_scaling"]
    assert {key: scaling[key] for key in theirs if key in scaling}.items() <= theirs.items()
    assert scaling["rope_type"] == theirs["type"]


def test_the_smoke_trains_the_network_and_the_checkpoint_of_its_base() -> None:
    base, rl = _load("configs/smoke/base.yaml"), _load("configs/smoke/r1_zero.yaml")
    assert replace(rl.model, init=base.model.init) == base.model
    assert rl.model.init == f"runs/{base.name}/checkpoints/step_{base.stage.steps:06d}"
    assert rl.seed == base.seed
