"""The command line and environment of every process of a job; pure, so that tests can read them.

Another way to start a job (Slurm) runs the same commands; only who starts them differs.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from r1mega.cluster import secrets
from r1mega.config.schema import Config
from r1mega.rollout.p2p.invite import LOADER
from r1mega.run.directory import RunDirectory


def learner_argv(
    config: Config, verb: str, layers: Sequence[str], *, port: int, logs: Path
) -> list[str]:
    """All learner ranks of this machine; all output but rank 0's standard output goes to logs."""
    count = config.cluster.learner_processes_per_node
    to_files = ",".join(["0:2", *(f"{rank}:3" for rank in range(1, count))])
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=1",
        "--node-rank=0",
        f"--nproc-per-node={count}",
        f"--master-addr={config.cluster.host}",
        f"--master-port={port}",
        f"--log-dir={logs}",
        f"--redirects={to_files}",
        "-m",
        "r1mega",
        "worker",
        verb,
        *layers,
    ]


def learner_environment(config: Config) -> dict[str, str]:
    common = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "110"}  # seconds, as ranks may be saving
    if config.cluster.backend == "cpu":
        return {**common, **_CPU, **_interface(config.cluster.host)}
    devices = _devices(range(config.cluster.learner_processes_per_node))
    # Megatron overlaps communication with tensor parallel GEMMs only under one connection.
    return {**common, **devices, "CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONUNBUFFERED": "1"}


def engine_argv(
    config: Config, directory: RunDirectory, *, port: int, has_key: bool = False
) -> list[str]:
    """One engine. It starts with random weights: the learner publishes before the first request.

    ``has_key``: it asks for a key, which SGLang reads in ``directory.secrets``.
    """
    rollout = config.rollout
    common = [
        "--model-path",
        str(directory.engine_model.resolve()),  # the router, too, reads the tokenizer there
        "--host",
        config.cluster.host,
        "--port",
        str(port),
        "--load-format",
        "dummy",
        "--max-running-requests",
        str(rollout.max_running_requests),
        "--context-length",
        str(rollout.context_tokens),
    ]
    if config.algorithm.replay_routing:
        common.append("--enable-return-routed-experts")
    if rollout.engine == "embedded":
        timeout = ["--dist-timeout", str(config.cluster.collective_timeout_s)]
        return [sys.executable, "-m", "r1mega.rollout.engine", *common, *timeout]
    device = _sglang_cpu(config) if config.cluster.backend == "cpu" else _sglang_cuda(config)
    key = secrets.arguments(directory.secrets) if has_key else []
    launch = [rollout.sglang_python, "-m", "sglang.launch_server"]
    loader = ["--custom-weight-loader", LOADER]
    return [*launch, *common, *device, *loader, *key, *rollout.sglang_args]


def engine_environment(
    config: Config, directory: RunDirectory, index: int, *, has_key: bool = False
) -> dict[str, str]:
    """Engines take the GPUs after the learner's, ``gpus_per_engine`` each."""
    sglang: dict[str, str] = {}
    if config.rollout.engine == "sglang":
        key = secrets.environment(directory.secrets) if has_key else {}
        sglang = {**key, **_sglang_environment(config, directory.engine_packages)}
    if config.cluster.backend == "cpu":
        return {**_CPU, **_interface(config.cluster.host), **sglang}
    size = config.cluster.gpus_per_engine
    first = config.cluster.learner_processes_per_node + index * size
    return {**_devices(range(first, first + size)), "PYTHONUNBUFFERED": "1", **sglang}


# One thread per process: on shared cores a second one costs more than it brings.
_CPU = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}


def _interface(host: str) -> dict[str, str]:
    """Gloo asks the host's name for an address, which on many a laptop leads nowhere."""
    return {"GLOO_SOCKET_IFNAME": "lo"} if host.startswith("127.") else {}


def _devices(devices: range) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": ",".join(str(device) for device in devices)}


def _sglang_environment(config: Config, packages: Path) -> dict[str, str]:
    """Not our own PYTHONPATH, which may lead to other packages than SGLang's."""
    given = config.rollout.sglang_env
    paths = [str(packages.resolve()), *filter(None, [given.get("PYTHONPATH")])]
    cpu = {"SGLANG_USE_CPU_ENGINE": "1"} if config.cluster.backend == "cpu" else {}
    return {**cpu, **given, "PYTHONPATH": os.pathsep.join(paths)}


def _sglang_cpu(config: Config) -> list[str]:
    tokens = config.rollout.context_tokens * config.rollout.max_running_requests
    return [
        "--device",
        "cpu",
        "--attention-backend",
        "torch_native",
        "--dtype",
        "float32",
        "--max-total-tokens",
        str(tokens),
        "--disable-overlap-schedule",
        "--skip-server-warmup",
        "--sleep-on-idle",  # else an idle server keeps one core busy
    ]


def _sglang_cuda(config: Config) -> list[str]:
    return [
        "--tp-size",
        str(config.cluster.gpus_per_engine),
        "--dtype",
        engine_dtype(config),
        "--disable-shared-experts-fusion",  # it would rename and move them: weights.engine_names
    ]


def engine_dtype(config: Config) -> str:
    """In which engines compute on GPUs, and which their config.json names."""
    return "float32" if config.learner.precision == "fp32" else "bfloat16"
