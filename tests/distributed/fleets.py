"""Real engines and a real router on a tiny random model, for the tests of this folder."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from r1mega.config.schema import Model, RopeScaling
from r1mega.data.tokenizer import save_tokenizer
from r1mega.model.hf_config import hf_config
from r1mega.records import Prompt, SampleRequest, Sampling
from r1mega.rollout import control
from r1mega.rollout.fleet import EngineHandle, Fleet, write_engine
from r1mega.rollout.router import RouterClient, router_argv
from r1mega.system import processes
from r1mega.system.processes import Process
from r1mega.weights.names import hf_shapes

MODEL = Model(
    num_hidden_layers=2, rope_scaling=RopeScaling(factor=4.0, original_max_position_embeddings=64)
)
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
SAMPLING = Sampling(temperature=1.0, max_tokens=48, stop_token_ids=(1,))


def wait_until(condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


@dataclass(kw_only=True)
class RunningFleet:
    """Folders and processes of one test."""

    folder: Path
    router_url: str
    router: Process
    engines: dict[str, Process] = field(default_factory=dict)

    def client(self) -> Fleet:
        router = RouterClient(self.router_url)
        return Fleet(self.folder / "fleet", router, logs=self.folder / "logs")

    def kill(self, name: str) -> None:
        """Kill an engine as the machine would, and see it dead."""
        os.kill(self.engines[name].pid, signal.SIGKILL)
        assert self.engines[name].wait(30) is not None

    def start_engine(self, name: str, incarnation: int = 0) -> None:
        """Start an engine, wait for it and register it, as the launcher does."""
        self.register(name, self.launch(name), incarnation)

    def launch(self, name: str) -> str:
        """Start an engine; its URL."""
        port = processes.free_port()
        argv = [sys.executable, "-m", "r1mega.rollout.engine", "--model-path"]
        argv += [str(self.folder / "model"), "--port", str(port), "--load-format", "dummy"]
        argv += ["--max-running-requests", "8", "--context-length", "96", "--dist-timeout", "60"]
        log = self.folder / "logs" / f"{name}.log"
        self.engines[name] = processes.start(argv, name=name, log=log, env=ENVIRONMENT)
        return f"http://127.0.0.1:{port}"

    def register(self, name: str, url: str, incarnation: int) -> None:
        process = self.engines[name]
        wait_until(lambda: control.answers(f"{url}/health", timeout_s=5) or not process.alive())
        assert process.alive(), processes.last_lines(process.log)
        engine = EngineHandle(name=name, url=url, pid=process.pid, incarnation=incarnation)
        write_engine(self.folder / "fleet", engine)


@contextmanager
def running_fleet(folder: Path, num_engines: int) -> Iterator[RunningFleet]:
    (folder / "fleet").mkdir()
    save_tokenizer("arithmetic", folder / "model")
    (folder / "model" / "config.json").write_text(json.dumps(hf_config(MODEL)))
    port = processes.free_port()
    argv = router_argv("127.0.0.1", port, metrics_port=processes.free_port(), request_timeout_s=120)
    router = processes.start(argv, name="router", log=folder / "logs" / "router.log")
    fleet = RunningFleet(folder=folder, router_url=f"http://127.0.0.1:{port}", router=router)
    try:
        urls = {f"engine-{i}": fleet.launch(f"engine-{i}") for i in range(num_engines)}
        for name, url in urls.items():
            fleet.register(name, url, 0)
        wait_until(RouterClient(fleet.router_url).answers)
        yield fleet
    finally:
        processes.end([router, *fleet.engines.values()], grace_s=5)


def weights(seed: int, model: Model = MODEL) -> dict[str, torch.Tensor]:
    """Random weights by Hugging Face's names."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * 0.1
        for name, shape in hf_shapes(model).items()
    }


def requests(num_prompts: int, per_prompt: int, name: str = "p") -> list[SampleRequest]:
    prompts = [
        Prompt(
            uid=f"{name}/{i}",
            text="",
            token_ids=tuple(range(3, 9 + i % 5)),
            question="",
            answer="",
        )
        for i in range(num_prompts)
    ]
    return [
        SampleRequest(prompt=prompt, index=j, seed=1000 * i + j)
        for i, prompt in enumerate(prompts)
        for j in range(per_prompt)
    ]
