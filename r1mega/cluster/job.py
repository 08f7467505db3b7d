"""The launcher of one machine: start router, engines and learner, watch them, end all of them.

Whatever happens here (the learner's end, a failure, Ctrl-C, SIGTERM, even SIGKILL), nothing that
was started stays behind. One launcher at a time works on a run directory.
"""

import fcntl
import json
import logging
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import r1mega
from r1mega.cluster import commands, secrets
from r1mega.cluster.continuation import nothing_to_do, notices
from r1mega.cluster.engines import Engines
from r1mega.cluster.errors import JobFailed, learner_failure, note_on_space
from r1mega.cluster.preflight import check_inputs, check_key, check_machines, check_packages
from r1mega.config.load import dump
from r1mega.config.schema import Config
from r1mega.data.tokenizer import save_tokenizer
from r1mega.model.hf_config import hf_config
from r1mega.rollout import control
from r1mega.rollout.router import RouterClient, router_argv, write_router
from r1mega.run.directory import RunDirectory
from r1mega.system import files, processes
from r1mega.system.processes import SENTENCE, Process

log = logging.getLogger(__name__)

_LEARNER_GRACE_S = 120.0  # for a checkpoint on its way to disk; without one it ends at once
_SERVER_GRACE_S = 5.0
_ROUTER_START_TIMEOUT_S = 60.0
_TICK_S = 0.1


def run(verb: str, config: Config, layers: Sequence[str]) -> int:
    """Run one stage on this machine; the exit code of the learner, or 1 with a sentence."""
    try:
        check_machines(config.cluster)
        check_packages(config.learner)
        if needs_engines(config):
            check_key(config.cluster.host)
        check_inputs(config)
        directory = _open_directory(config)
        with _locked(directory), _signals_end_us():
            if verb != "eval" and (sentence := nothing_to_do(config, directory)):
                print(sentence)
                return 0
            return _Job(verb, config, layers, directory).run()
    except JobFailed as error:
        sys.stderr.write(f"{SENTENCE}{error}\n")
        return 1


class _Job:
    """The processes of one run, from start to end."""

    def __init__(
        self, verb: str, config: Config, layers: Sequence[str], directory: RunDirectory
    ) -> None:
        self._verb = verb
        self._config = config
        self._layers = layers
        self._directory = directory
        self._api_key = control.api_key()
        self._router: Process | None = None
        self._engines: Engines | None = None
        self._learner: Process | None = None

    def run(self) -> int:
        try:
            self._prepare()
            if needs_engines(self._config):
                self._router = self._start_router()
                self._engines = self._start_engines()
            self._learner = self._start_learner()
            log.info("logs are in %s", self._directory.logs)
            return self._watch(self._learner)
        except OSError as error:
            raise JobFailed(f"{error}{note_on_space(self._directory.path)}") from error
        finally:
            self._end()

    def _prepare(self) -> None:
        """Everything the processes read is there before the first one starts."""
        if self._verb != "eval":  # which only looks at what a run has made
            for notice in notices(self._config, self._directory):
                print(notice, flush=True)
            dump(self._config, self._directory.config_path)
        for stale in self._directory.fleet.glob("*.json"):
            stale.unlink()
        for log_path in self._directory.logs.glob("*.log"):  # last words are those of this launch
            log_path.replace(log_path.with_suffix(".log.1"))
        model_path = self._directory.engine_model
        save_tokenizer(self._config.model.tokenizer, model_path)
        values = hf_config(
            self._config.model,
            dtype=commands.engine_dtype(self._config),
            quantized=self._config.rollout.quantization == "fp8",
        )
        files.write_atomically(model_path / "config.json", json.dumps(values, indent=2) + "\n")
        if self._config.rollout.engine == "sglang":
            link_package(self._directory.engine_packages)
            if self._api_key is not None:
                secrets.write(self._directory.secrets, self._api_key)

    def _start_router(self) -> Process:
        cluster, rollout = self._config.cluster, self._config.rollout
        port = cluster.router_port or processes.free_port(cluster.host)
        argv = router_argv(
            cluster.host,
            port,
            metrics_port=processes.free_port(cluster.host),
            request_timeout_s=rollout.request_timeout_s,
        )
        process = processes.start(argv, name="router", log=self._directory.logs / "router.log")
        self._router = process  # known to _end() while we wait
        url = f"http://{cluster.host}:{port}"
        _wait_for_router(RouterClient(url), process)
        write_router(self._directory.fleet, url, process.pid)
        return process

    def _start_engines(self) -> Engines:
        return Engines(
            self._start_engine,
            count=self._config.rollout.engines,
            host=self._config.cluster.host,
            folder=self._directory.fleet,
            start_timeout_s=self._config.rollout.engine_start_timeout_s,
            silence_timeout_s=self._config.rollout.engine_silence_timeout_s,
            max_restarts=self._config.rollout.max_restarts,
        )

    def _start_engine(self, index: int, port: int) -> Process:
        has_key = self._api_key is not None
        return processes.start(
            commands.engine_argv(self._config, self._directory, port=port, has_key=has_key),
            name=f"engine-{index}",
            log=self._directory.logs / f"engine-{index}.log",
            env=commands.engine_environment(self._config, self._directory, index, has_key=has_key),
        )

    def _start_learner(self) -> Process:
        cluster = self._config.cluster
        port = cluster.master_port or processes.free_port(cluster.host)
        logs = self._directory.logs / "learner"
        argv = commands.learner_argv(self._config, self._verb, self._layers, port=port, logs=logs)
        return processes.start(
            argv,
            name="learner",
            log=self._directory.logs / "learner.log",
            env=commands.learner_environment(self._config),
            inherit_stdout=True,
        )

    def _watch(self, learner: Process) -> int:
        """Until the learner ends, or something ends that it cannot do without."""
        while (code := learner.exit_code()) is None:
            if self._router is not None and not self._router.alive():
                raise _router_ended(self._router)
            if self._engines is not None:
                self._engines.tick()
            time.sleep(_TICK_S)
        if code != 0:
            logs = self._directory.logs / "learner"
            sys.stderr.write(f"{SENTENCE}{learner_failure(learner, code, logs)}\n")
        return code

    def _end(self) -> None:
        """The learner first: its last requests may still need the engines."""
        if self._learner is not None:
            processes.end([self._learner], grace_s=_LEARNER_GRACE_S)
        servers = [] if self._router is None else [self._router]
        if self._engines is not None:
            self._engines.close()
            servers += self._engines.processes()
        processes.end(servers, grace_s=_SERVER_GRACE_S)
        for entry in self._directory.fleet.glob("*.json"):
            entry.unlink()
        shutil.rmtree(self._directory.secrets, ignore_errors=True)


def link_package(folder: Path) -> None:
    """Make ``folder`` with nothing in it but r1mega: where ours is installed are other packages of
    other versions than SGLang's."""
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "r1mega"
    link.unlink(missing_ok=True)
    link.symlink_to(Path(r1mega.__file__).parent)


def needs_engines(config: Config) -> bool:
    """Whether this stage samples."""
    return config.stage.kind != "sft" and config.rollout.replay is None


def _open_directory(config: Config) -> RunDirectory:
    try:
        return RunDirectory.create(config.run.root, config.name)
    except OSError as error:
        raise JobFailed(
            f"run.root={config.run.root} cannot hold the folder {config.name}: {error.strerror}"
        ) from error


def _router_ended(process: Process) -> JobFailed:
    return JobFailed(processes.obituary("the router", process.exit_code(), process.log))


def _wait_for_router(client: RouterClient, process: Process) -> None:
    deadline = time.monotonic() + _ROUTER_START_TIMEOUT_S
    while not client.answers():
        if not process.alive():
            raise _router_ended(process)
        if time.monotonic() > deadline:
            raise JobFailed(
                f"the router at {client.url} did not answer within {_ROUTER_START_TIMEOUT_S:.0f} s"
                f": {processes.last_words(process.log)}"
            )
        time.sleep(_TICK_S)


@contextmanager
def _locked(directory: RunDirectory) -> Iterator[None]:
    with (directory.path / "launcher.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise JobFailed(
                f"another launcher works on {directory.path}: wait for its end, or give this run "
                "another name=..."
            ) from error
        yield


@contextmanager
def _signals_end_us() -> Iterator[None]:
    """Turn the signals that ask us to end into an exception, so that ``finally`` runs."""

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # once is enough; the end has its own time limit
        raise SystemExit(128 + number)

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
