"""Read a run's configuration: dataclass defaults < layers, left to right.

A layer is a YAML file or ``key=value``. Keys are checked here, before the merge, so that every
error can name the layer and the nearest known key; OmegaConf converts and types the values.
"""

from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from r1mega.config.checks import check
from r1mega.config.errors import ConfigError
from r1mega.config.schema import Config

_WORDS = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    list: "a list of strings",
    dict: "a mapping",
}


def load(layers: Sequence[str]) -> Config:
    """Merge ``layers`` onto the defaults and check the whole; every mistake is a ConfigError."""
    merged = OmegaConf.structured(Config)
    for layer in layers:
        values = _read(layer)
        for problem in _key_problems(OmegaConf.to_container(values), Config, ()):
            raise ConfigError(f"{layer}: {problem}")
        try:
            merged = OmegaConf.merge(merged, values)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{layer}: {_explain(error, values)}") from None
    config = cast(Config, OmegaConf.to_object(merged))
    check(config)
    return config


def dump(config: Config, path: Path) -> None:
    """Write ``config`` in the form ``load`` reads."""
    path.write_text(to_yaml(config), encoding="utf-8")


def to_yaml(config: Config) -> str:
    """Every key of ``config``, in the order of the schema."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _read(layer: str) -> DictConfig:
    is_file = layer.endswith((".yaml", ".yml"))
    if not is_file and "=" in layer:
        return _read_assignment(layer)
    path = Path(layer)
    if path.is_file():
        return _read_file(path)
    if not is_file:
        raise ConfigError(f"{layer}: neither a YAML file nor key=value")
    close = get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
    hint = f"; did you mean {path.parent / close[0]}?" if close else ""
    raise ConfigError(f"{layer}: no such file (seen from {Path.cwd()}){hint}")


def _read_assignment(layer: str) -> DictConfig:
    if layer.startswith("="):
        raise ConfigError(f"{layer}: expected key=value, and there is no key")
    try:
        return OmegaConf.from_dotlist([layer])
    except yaml.YAMLError as error:
        raise ConfigError(f"{layer}: the value is not valid YAML: {_problem(error)}") from None


def _read_file(path: Path) -> DictConfig:
    try:
        values = OmegaConf.load(path)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: broken YAML: {_problem(error)}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {_problem(error)}") from None
    if not isinstance(values, DictConfig):
        raise ConfigError(f"{path}: expected a mapping of keys to values, found a list")
    return values


def _problem(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem:
        return error.problem
    return str(error).splitlines()[0]


def _key_problems(values: Any, schema: type, path: tuple[str, ...]) -> Iterator[str]:
    """Unknown keys, sections that are no sections, and interpolations: one sentence each."""
    hints = get_type_hints(schema)
    for name, value in values.items():
        here = (*path, str(name))
        key = ".".join(here)
        section = _section(hints[name]) if name in hints else None
        if name not in hints:
            yield _unknown(key, here, list(hints))
        elif section is not None and isinstance(value, dict):
            yield from _key_problems(value, section, here)
        elif section is not None and not (value is None and NoneType in get_args(hints[name])):
            known = ", ".join(get_type_hints(section))
            yield f"{key} is a section of keys ({known}), not {_shown(value)}"
        elif "${" in str(value):
            yield f"{key}={value}: interpolation is not supported; write the value itself"


def _section(hint: Any) -> type | None:
    """The dataclass a field holds, or None for a leaf."""
    return next((t for t in (hint, *get_args(hint)) if is_dataclass(t)), None)  # type: ignore[return-value]


def _unknown(key: str, path: tuple[str, ...], siblings: list[str]) -> str:
    elsewhere = [known for known in _all_keys(Config) if known.split(".")[-1] == path[-1]]
    close = [".".join((*path[:-1], c)) for c in get_close_matches(path[-1], siblings, n=1)]
    if likely := elsewhere or close:
        return f"unknown key '{key}'; did you mean {' or '.join(map(repr, likely))}?"
    return f"unknown key '{key}'; known keys: {', '.join(siblings)}"


def _all_keys(schema: type, prefix: str = "") -> Iterator[str]:
    for name, hint in get_type_hints(schema).items():
        section = _section(hint)
        if section is None:
            yield prefix + name
        else:
            yield from _all_keys(section, f"{prefix}{name}.")


def _explain(error: OmegaConfBaseException, values: DictConfig) -> str:
    """A value that does not fit its key: the key, the value and what was expected."""
    key = str(error.full_key)
    given = OmegaConf.select(values, key)
    value = OmegaConf.to_container(given) if OmegaConf.is_config(given) else given
    return f"{key} must be {_expected(key)}, not {_shown(value)}"


def _shown(value: object) -> str:
    return "null" if value is None else repr(value)


def _expected(key: str) -> str:
    hint: Any = Config
    for name in key.split("."):
        section = _section(hint)
        if section is None:  # inside a list or a mapping of the user's own
            break
        hint = get_type_hints(section)[name.split("[")[0]]
    options = [option for option in get_args(hint) if option is not NoneType]
    if get_origin(hint) is Literal:
        return f"one of {', '.join(options)}"
    optional = NoneType in get_args(hint)
    plain = options[0] if optional else get_origin(hint) or hint
    return _WORDS[plain] + (" or null" if optional else "")
