"""Tiny models on disk, schedulers over them, and real server processes."""

import json
import os
import subprocess
import sys
import time
import urllib.error
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from r1mega.model.hf_config import hf_config
from r1mega.rollout.engine.cache import Cache
from r1mega.rollout.engine.network import Network
from r1mega.rollout.engine.requests import Asked, Completion, Request
from r1mega.rollout.engine.scheduler import Scheduler
from r1mega.rollout.engine.weights import allocate, load_folder
from r1mega.system.processes import free_port
from tests.unit.rollout.engine.tools import CONTEXT, MODELS, Saved, Server, reference

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Saved]:
    """``saved("yarn", seed)``: written once per session."""
    made: dict[tuple[str, int], Saved] = {}

    def get(kind: str, seed: int = 0) -> Saved:
        if (kind, seed) not in made:
            folder = tmp_path_factory.mktemp(f"{kind}_{seed}")
            network = reference(MODELS[kind], seed)
            network.save_pretrained(folder)
            (folder / "config.json").write_text(json.dumps(hf_config(MODELS[kind])))
            made[kind, seed] = Saved(MODELS[kind], folder, network)
        return made[kind, seed]

    return get


@pytest.fixture
def scheduler_of() -> Callable[..., Scheduler]:
    """A scheduler over a saved model, without a thread or a server."""

    def build(
        saved: Saved,
        *,
        num_slots: int = 16,
        prefill_tokens: int = 64,
        reuse_prefixes: bool = True,
        records_experts: bool = False,
    ) -> Scheduler:
        weights = allocate(saved.model)
        load_folder(weights, saved.folder)
        network = Network(saved.model, weights, CONTEXT)
        cache = Cache(
            saved.model,
            num_slots=num_slots,
            num_positions=CONTEXT,
            prefix_bytes=1 << 20,
            records_experts=records_experts,
        )
        return Scheduler(
            network,
            cache,
            version="v0",
            prefill_tokens=prefill_tokens,
            reuse_prefixes=reuse_prefixes,
        )

    return build


@pytest.fixture
def submit() -> Callable[..., "Future[Completion]"]:
    """Add a request to a scheduler."""

    def add(scheduler: Scheduler, prompt: Sequence[int], **asked: Any) -> "Future[Completion]":
        future: Future[Completion] = Future()
        name = asked.pop("rid", f"r{id(future)}")
        fields = {"max_new_tokens": 16, **asked}
        request = Asked(rid=name, parent_rid=name, prompt=tuple(prompt), **fields)
        scheduler.add(Request(request, future))
        return future

    return add


@pytest.fixture
def run_all() -> Callable[[Scheduler], None]:
    def run(scheduler: Scheduler) -> None:
        with torch.inference_mode():
            while scheduler.can_step:
                scheduler.step()

    return run


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """``start_server(folder, "--flag", "value")`` returns once /health answers."""
    servers: list[Server] = []

    def start(folder: Path, *flags: str) -> Server:
        port = free_port("127.0.0.1")
        argv = [sys.executable, "-m", "r1mega.rollout.engine", "--model-path", str(folder)]
        argv += ["--port", str(port), "--context-length", str(CONTEXT), *flags]
        with (tmp_path / f"engine_{port}.log").open("wb") as log:
            process = subprocess.Popen(
                argv, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
        server = Server(f"http://127.0.0.1:{port}", port, process)
        servers.append(server)
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None, (tmp_path / f"engine_{port}.log").read_text()
            assert time.monotonic() < deadline, "the engine did not start"
            try:
                if server.call("/health")[0] == 200:
                    return server
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)

    yield start
    for server in servers:
        server.process.kill()
        server.process.wait(10)
