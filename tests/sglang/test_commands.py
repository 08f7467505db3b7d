"""SGLang itself understands the command lines and the key file that the launcher gives it."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from r1mega.cluster import commands, secrets
from r1mega.config import load
from r1mega.run.directory import RunDirectory
from tests.sglang.servers import PLUGIN, PYTHON

# Parses as launch_server does and prints what came of it and of SGLang's defaults.
_PARSE = """
import argparse, json, sys, warnings
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger
warnings.simplefilter("error")
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
argv = ConfigArgumentMerger(parser).merge_config_with_args(sys.argv[1:])
print(json.dumps(vars(parser.parse_args(argv)), default=str))
"""
LAYERS = {
    "cpu": ["rollout.engine=sglang", "algorithm.replay_routing=true"],
    "smoke_8gpu": ["configs/cluster/smoke_8gpu.yaml"],
    "h100x256": ["configs/model/deepseek_v3.yaml", "configs/cluster/h100x256.yaml"],
}


@pytest.mark.parametrize("name", LAYERS)
def test_sglang_takes_the_command_line(name: str, tmp_path: Path) -> None:
    config, run = load(LAYERS[name]), RunDirectory(tmp_path)
    secrets.write(run.secrets, "s3cret: #")
    argv = commands.engine_argv(config, run, port=12345, has_key=True)
    found = parsed(argv[3:])
    assert (found["host"], found["port"]) == (config.cluster.host, 12345)
    assert found["api_key"] == "s3cret: #"
    assert found["load_format"] == "dummy"
    assert found["context_length"] == config.rollout.context_tokens
    assert found["max_running_requests"] == config.rollout.max_running_requests
    assert found["enable_return_routed_experts"] is config.algorithm.replay_routing
    if name == "cpu":
        assert (found["device"], found["attention_backend"]) == ("cpu", "torch_native")
        assert found["sleep_on_idle"]
    else:
        assert found["tp_size"] == config.cluster.gpus_per_engine
        assert found["disable_shared_experts_fusion"]
    if name == "h100x256":
        assert (found["ep_size"], found["attn_dp_size"]) == (32, 4)


def parsed(argv: list[str]) -> dict[str, Any]:
    environment = {"PYTHONPATH": str(PLUGIN), "SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [PYTHON, "-c", _PARSE, *argv], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr.lower(), done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))
