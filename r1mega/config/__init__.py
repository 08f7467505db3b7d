"""A run's configuration: ``schema`` (its keys), ``load``, ``checks``, ``derived``; no torch."""

from r1mega.config.errors import ConfigError
from r1mega.config.load import dump, load
from r1mega.config.schema import (
    Algorithm,
    Cluster,
    Config,
    Data,
    Learner,
    Model,
    Parallel,
    Rewards,
    Rollout,
    RopeScaling,
    Run,
    Stage,
)

__all__ = [
    "Algorithm",
    "Cluster",
    "Config",
    "ConfigError",
    "Data",
    "Learner",
    "Model",
    "Parallel",
    "Rewards",
    "Rollout",
    "RopeScaling",
    "Run",
    "Stage",
    "dump",
    "load",
]
