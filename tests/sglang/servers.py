"""Real SGLang servers on this machine's CPUs.

    .venv/bin/python -m tests.sglang.servers HF_FOLDER [argument of launch_server ...]

serves a folder until Ctrl-C; ready in about 15 s of an idle core.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1mega.cluster import commands
from r1mega.cluster.job import link_package
from r1mega.config.schema import Config, Model, Rollout
from r1mega.data.tokenizer import save_tokenizer
from r1mega.model.hf_config import hf_config, model_from_hf
from r1mega.rollout import control
from r1mega.run.directory import RunDirectory
from r1mega.system import processes
from r1mega.system.processes import Process

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-sglang/bin/python"
PLUGIN = ROOT / "tests/sglang/plugin"
# SGLang gives each rank of a server cores of its own, and there are ranks without any.
ENVIRONMENT = {"PYTHONPATH": str(PLUGIN), "SGLANG_CPU_OMP_THREADS_BIND": "0|0"}
START_TIMEOUT_S = 240.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    url: str
    process: Process

    def post(self, route: str, **body: Any) -> dict[str, Any]:
        return control.post(self.url + route, body, timeout_s=60)

    def get(self, route: str) -> dict[str, Any]:
        return control.get(self.url + route, timeout_s=60)

    def load(self, folder: Path, *, version: int) -> dict[str, Any]:
        body = {"model_path": str(folder.resolve()), "weight_version": str(version)}
        body["load_format"] = "auto"  # not the dummy weights that it started from
        return self.post("/update_weights_from_disk", **body)

    def generate(
        self, token_ids: list[int], num_tokens: int, *, seed: int = 1, **body: Any
    ) -> dict[str, Any]:
        """One response of ``num_tokens``, with log-probs."""
        sampling = {"max_new_tokens": num_tokens, "ignore_eos": True, "sampling_seed": seed}
        request = {"input_ids": token_ids, "sampling_params": sampling, "return_logprob": True}
        return self.post("/generate", **request, **body)


@contextmanager
def running_server(folder: Path, model: Model, *arguments: str) -> Iterator[Server]:
    """A server as the launcher starts it, with random weights of ``model``."""
    rollout = Rollout(
        engine="sglang",
        sglang_python=str(PYTHON),
        sglang_args=list(arguments),
        sglang_env=ENVIRONMENT,
        context_tokens=model.max_position_embeddings,
        max_running_requests=16,
    )
    config, run = Config(model=model, rollout=rollout), RunDirectory(folder)
    save_tokenizer(model.tokenizer, run.engine_model)
    (run.engine_model / "config.json").write_text(json.dumps(hf_config(model)))
    link_package(run.engine_packages)
    port = processes.free_port()
    process = processes.start(
        commands.engine_argv(config, run, port=port),
        name="sglang",
        log=folder / "sglang.log",
        env=commands.engine_environment(config, run, 0),
    )
    server = Server(url=f"http://127.0.0.1:{port}", process=process)
    try:
        _wait_for(server)
        yield server
    finally:
        processes.end([process], grace_s=10)


def _wait_for(server: Server) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not control.answers(f"{server.url}/model_info", timeout_s=5):
        log = processes.last_lines(server.process.log, 40)
        assert server.process.alive(), log
        assert time.monotonic() < deadline, log
        time.sleep(0.2)


def main() -> None:
    folder, *arguments = sys.argv[1:]
    model = model_from_hf(json.loads((Path(folder) / "config.json").read_text()))
    with running_server(Path(folder) / "server", model, *arguments) as server:
        server.load(Path(folder), version=0)
        print(f"{server.url} serves {folder}; its log is {server.process.log}", flush=True)
        server.process.wait(float("inf"))


if __name__ == "__main__":
    main()
