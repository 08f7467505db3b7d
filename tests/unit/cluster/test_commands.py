"""Command lines and environments of a job's processes."""

import argparse
import json
import os
import sys
from pathlib import Path

import pytest
import yaml

from r1mega.cluster import commands, secrets
from r1mega.cluster.errors import FailedRank, failed_rank
from r1mega.cluster.job import needs_engines
from r1mega.config import Algorithm, Cluster, Config, Rollout, load
from r1mega.run.directory import RunDirectory

RUN = RunDirectory(Path("/runs/x"))


def options(argv: list[str]) -> dict[str, str]:
    return {argv[i]: argv[i + 1] for i in range(len(argv) - 1) if argv[i].startswith("--")}


def test_embedded_engine() -> None:
    config = Config(rollout=Rollout(context_tokens=128, max_running_requests=3))
    argv = commands.engine_argv(config, RUN, port=123)
    assert argv[:3] == [sys.executable, "-m", "r1mega.rollout.engine"]
    given = options(argv)
    assert given["--model-path"] == "/runs/x/engine_model"
    assert (given["--host"], given["--port"]) == ("127.0.0.1", "123")
    assert given["--load-format"] == "dummy"
    assert (given["--max-running-requests"], given["--context-length"]) == ("3", "128")
    environment = commands.engine_environment(config, RUN, 1)
    assert environment["OMP_NUM_THREADS"] == "1"
    assert environment["TORCHDYNAMO_DISABLE"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in environment


def test_engines_record_experts_where_they_are_replayed() -> None:
    for engine in ("embedded", "sglang"):
        for replay in (False, True):
            config = Config(
                rollout=Rollout(engine=engine), algorithm=Algorithm(replay_routing=replay)
            )
            argv = commands.engine_argv(config, RUN, port=123)
            assert ("--enable-return-routed-experts" in argv) is replay


def test_engine_model_path_is_absolute() -> None:
    argv = commands.engine_argv(Config(), RunDirectory(Path("runs/x")), port=1)
    assert options(argv)["--model-path"] == str(Path.cwd() / "runs/x/engine_model")


def test_sglang_on_cpu() -> None:
    rollout = Rollout(
        engine="sglang",
        sglang_python="/sgl/bin/python",
        sglang_args=["--log-level", "warning"],
        context_tokens=100,
        max_running_requests=5,
    )
    config = Config(rollout=rollout)
    argv = commands.engine_argv(config, RUN, port=123)
    assert argv[:3] == ["/sgl/bin/python", "-m", "sglang.launch_server"]
    assert argv[-2:] == ["--log-level", "warning"]
    assert "--config" not in argv
    given = options(argv)
    assert (given["--device"], given["--attention-backend"]) == ("cpu", "torch_native")
    assert given["--max-total-tokens"] == "500"
    assert {"--sleep-on-idle", "--disable-overlap-schedule"} <= set(argv)
    assert commands.engine_environment(config, RUN, 0)["SGLANG_USE_CPU_ENGINE"] == "1"


def test_sglang_has_its_packages_its_environment_and_its_key_from_files(tmp_path: Path) -> None:
    """Neither command line nor environment shows the key; only its owner reads the file."""
    run = RunDirectory(tmp_path)
    secrets.write(run.secrets, key := "s3cret: #")
    rollout = Rollout(engine="sglang", sglang_env={"PYTHONPATH": "/mine", "NCCL_DEBUG": "INFO"})
    config = Config(rollout=rollout)
    argv = commands.engine_argv(config, run, port=123, has_key=True)
    environment = commands.engine_environment(config, run, 0, has_key=True)
    assert environment["PYTHONPATH"] == f"{run.engine_packages}:/mine"
    assert environment["NCCL_DEBUG"] == "INFO"
    assert key not in str(argv) + str(environment)
    file = Path(options(argv)["--config"])
    assert yaml.safe_load(file.read_text()) == {"api-key": key}
    assert file.suffix == ".yaml"
    assert file.stat().st_mode & 0o077 == file.parent.stat().st_mode & 0o077 == 0
    logging = json.loads(Path(environment["SGLANG_LOGGING_CONFIG_PATH"]).read_text())
    assert logging["loggers"]["sglang.srt.entrypoints.engine"]["level"] == "WARNING"


def test_sglang_on_cuda_takes_the_gpus_after_the_learners() -> None:
    config = Config(
        rollout=Rollout(engine="sglang", engines=2),
        cluster=Cluster(backend="cuda", learner_processes_per_node=4, gpus_per_engine=2),
    )
    given = options(commands.engine_argv(config, RUN, port=123))
    assert (given["--tp-size"], given["--dtype"]) == ("2", "bfloat16")
    assert "--device" not in given
    assert commands.learner_environment(config)["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"
    assert commands.engine_environment(config, RUN, 0)["CUDA_VISIBLE_DEVICES"] == "4,5"
    assert commands.engine_environment(config, RUN, 1)["CUDA_VISIBLE_DEVICES"] == "6,7"


def test_learner_is_understood_by_torch_distributed_run() -> None:
    run = pytest.importorskip("torch.distributed.run")
    config = Config(cluster=Cluster(learner_processes_per_node=3))
    layers = ["a.yaml", "learner.lr=1e-6"]
    argv = commands.learner_argv(config, "rl", layers, port=29123, logs=Path("/logs"))
    assert argv[:3] == [sys.executable, "-m", "torch.distributed.run"]
    parsed: argparse.Namespace = run.parse_args(argv[3:])
    assert (parsed.nproc_per_node, parsed.nnodes, parsed.node_rank) == ("3", "1", 0)
    assert (parsed.master_addr, parsed.master_port) == ("127.0.0.1", 29123)
    assert (parsed.redirects, parsed.log_dir) == ("0:2,1:3,2:3", "/logs")
    assert (parsed.module, parsed.training_script) == (True, "r1mega")
    assert parsed.training_script_args == ["worker", "rl", *layers]


@pytest.mark.parametrize(
    ("kind", "replay", "needed"),
    [
        ("rl", [], True),
        ("eval", [], True),
        ("sft", [], False),
        ("rl", ["rollout.replay=kept", "stage.only=train"], False),
    ],
)
def test_who_needs_engines(kind: str, replay: list[str], needed: bool) -> None:
    assert needs_engines(load([f"stage.kind={kind}", *replay])) is needed


def test_failed_rank_is_the_one_that_wrote_its_last_words_first(tmp_path: Path) -> None:
    """torch.distributed.run noticed rank 4 first, which lost its peer; rank 6 it ended itself."""
    summary, logs = tmp_path / "learner.log", tmp_path / "learner"
    assert failed_rank(summary, logs) is None
    entry = "  rank      : {} (local_rank: {})\n  exitcode  : {} (pid: 8)\n"
    summary.write_text(
        f"r1mega FAILED\n{entry.format(7, 3, 1)}"
        f"r1mega FAILED\n---\nFailures:\n{entry.format(6, 2, -15)}{entry.format(5, 1, -9)}"
        f"Root Cause (first observed failure):\n{entry.format(4, 0, 1)}"
    )
    found = {}
    for local_rank, written_at in enumerate((30, 20, 10, 0)):
        folder = logs / "none_abc" / "attempt_0" / str(local_rank)
        folder.mkdir(parents=True)
        (folder / "stdout.log").write_text("")
        found[local_rank] = folder / "stderr.log"
        found[local_rank].write_text("words")
        os.utime(found[local_rank], (written_at, written_at))
    assert failed_rank(summary, logs) == FailedRank(5, 137, found[1])
    found[1].write_text("")
    (found[1].parent / "stdout.log").write_text("words")
    os.utime(found[1].parent / "stdout.log", (20, 20))
    assert failed_rank(summary, logs) == FailedRank(5, 137, found[1].parent / "stdout.log")
