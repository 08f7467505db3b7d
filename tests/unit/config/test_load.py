"""Layers merge left to right, and every mistake is one sentence that names the layer."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from r1mega.config import Config, ConfigError, Data, Learner, dump, load
from r1mega.config.load import to_yaml
from r1mega.config.schema import RopeScaling

TYPICAL = [
    "name=second",
    "learner.lr=1e-6",
    "model.rope_scaling.factor=20",
    "rollout.sglang_args=[--ep-size,8]",
    "learner.megatron={moe_router_fusion: true, window: [1, 2]}",
    "data.path=a=b c.jsonl",
]


def _message(*layers: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(layers)
    return str(caught.value)


def test_defaults_are_a_valid_run() -> None:
    assert load([]) == Config()


def test_later_layers_win_whatever_their_kind(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yml"
    first.write_text("seed: 1\nlearner: {lr: 1e-3, min_lr: 1e-5}\n")
    second.write_text("learner:\n  lr: 2e-3\n")
    config = load(["seed=7", str(first), "learner.lr=5", str(second), "name=last"])
    assert (config.seed, config.learner.lr, config.learner.min_lr) == (1, 2e-3, 1e-5)
    assert config.name == "last"


def test_values_arrive_in_their_types() -> None:
    config = load(TYPICAL)
    assert config.learner.lr == 1e-6
    assert config.model.rope_scaling == RopeScaling(factor=20.0)
    assert config.rollout.sglang_args == ["--ep-size", "8"]
    assert config.learner.megatron == {"moe_router_fusion": True, "window": [1, 2]}
    assert config.data.path == "a=b c.jsonl"
    assert load([*TYPICAL, "model.rope_scaling=null"]).model.rope_scaling is None


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    empty = tmp_path / "empty.yaml"
    empty.write_text("# only a comment\n")
    assert load([str(empty)]) == Config()


@pytest.mark.parametrize("layers", [[], TYPICAL])
def test_dump_loads_back_equal(layers: list[str], tmp_path: Path) -> None:
    config = load(layers)
    dump(config, tmp_path / "config.yaml")
    assert load([str(tmp_path / "config.yaml")]) == config


@given(
    lr=st.floats(0, 1e3),
    seed=st.integers(),
    path=st.none() | st.text(st.characters(codec="utf-8", exclude_characters="$")),
)
def test_any_value_survives_dump(lr: float, seed: int, path: str | None) -> None:
    config = Config(seed=seed, learner=Learner(lr=lr), data=Data(path=path))
    read_back = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(to_yaml(config)))
    assert OmegaConf.to_object(read_back) == config


MISTAKES = {
    "parallel.tpp=2": "parallel.tpp=2: unknown key 'parallel.tpp'; did you mean 'parallel.tp'?",
    "paralel.tp=2": "paralel.tp=2: unknown key 'paralel'; did you mean 'parallel'?",
    "model.rope_scaling.fctor=2": (
        "model.rope_scaling.fctor=2: unknown key 'model.rope_scaling.fctor'; "
        "did you mean 'model.rope_scaling.factor'?"
    ),
    "tp=2": "tp=2: unknown key 'tp'; did you mean 'parallel.tp'?",
    "parallel.lr=2": "parallel.lr=2: unknown key 'parallel.lr'; did you mean 'learner.lr'?",
    "steps=2": "steps=2: unknown key 'steps'; did you mean 'rollout.steps' or 'stage.steps'?",
    "run.xyz=2": (
        "run.xyz=2: unknown key 'run.xyz'; known keys: root, resume, sample_rows, wandb_project"
    ),
    "parallel.tp=abc": "parallel.tp=abc: parallel.tp must be an integer, not 'abc'",
    "parallel.tp=1.5": "parallel.tp=1.5: parallel.tp must be an integer, not 1.5",
    "parallel.tp=true": "parallel.tp=true: parallel.tp must be an integer, not True",
    "parallel.tp=[1]": "parallel.tp=[1]: parallel.tp must be an integer, not [1]",
    "parallel.vpp=two": "parallel.vpp=two: parallel.vpp must be an integer or null, not 'two'",
    "learner.lr=fast": "learner.lr=fast: learner.lr must be a number, not 'fast'",
    "run.resume=maybe": "run.resume=maybe: run.resume must be true or false, not 'maybe'",
    "name=": "name=: name must be a string, not null",
    "rollout.engine=vllm": (
        "rollout.engine=vllm: rollout.engine must be one of embedded, sglang, not 'vllm'"
    ),
    "rollout.sglang_args=x": (
        "rollout.sglang_args=x: rollout.sglang_args must be a list of strings, not 'x'"
    ),
    "learner.megatron=3": "learner.megatron=3: learner.megatron must be a mapping, not 3",
    "run=3": "run=3: run is a section of keys (root, resume, sample_rows, wandb_project), not 3",
    "run=null": (
        "run=null: run is a section of keys (root, resume, sample_rows, wandb_project), not null"
    ),
    "name=${seed}": (
        "name=${seed}: name=${seed}: interpolation is not supported; write the value itself"
    ),
    "=3": "=3: expected key=value, and there is no key",
    "seed": "seed: neither a YAML file nor key=value",
    "seed=[1": "seed=[1: the value is not valid YAML: did not find expected ',' or ']'",
}


@pytest.mark.parametrize(("layer", "message"), MISTAKES.items())
def test_a_mistaken_assignment_is_one_sentence(layer: str, message: str) -> None:
    assert _message(layer) == message


BROKEN_FILES = {
    "learner:\n  lrr: 1\n": "FILE: unknown key 'learner.lrr'; did you mean 'learner.lr'?",
    "learner:\n  lr: fast\n": "FILE: learner.lr must be a number, not 'fast'",
    "rollout: {engine: vllm}\n": (
        "FILE: rollout.engine must be one of embedded, sglang, not 'vllm'"
    ),
    "seed: 1\nlearner:\n  lr: 1: 2\n": (
        "FILE:3: broken YAML: mapping values are not allowed in this context"
    ),
    "seed: 1\nseed: 2\n": "FILE:2: broken YAML: found duplicate key seed",
    "- seed\n": "FILE: expected a mapping of keys to values, found a list",
    "1: 2\n": "FILE: unknown key '1'; known keys: name, seed, run, ",
    "seed: \x00": "FILE: cannot be read: unacceptable character #x0000",
}


@pytest.mark.parametrize(("text", "message"), BROKEN_FILES.items())
def test_a_mistaken_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "layer.yaml"
    file.write_text(text)
    assert _message(str(file)).startswith(message.replace("FILE", str(file)))


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "tiny_moe.yaml").write_text("")
    missing = tmp_path / "tiny-moe.yaml"
    expected = f"{missing}: no such file (seen from {Path.cwd()}); "
    assert _message(str(missing)) == expected + f"did you mean {tmp_path / 'tiny_moe.yaml'}?"


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    file = tmp_path / "layer.yaml"
    file.write_bytes(b"name: \xff\xfe")
    assert _message(str(file)).startswith(f"{file}: cannot be read: ")
