"""The sglang-router (0.3.2) in front of the engines: its command line, and who it forwards to.

It starts with no worker and forwards /generate to the engines that the fleet admits. Requests with
one ``ROUTING_KEY`` go to one engine, the least loaded when the key is new, so that all samples of a
prompt share its prefix there; a request without the key may go anywhere.
"""

import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from r1mega.rollout import control
from r1mega.rollout.control import CallFailed
from r1mega.system import files

_FILE = "router.json"
ROUTING_KEY = "X-SMG-Routing-Key"
_CALL_TIMEOUT_S = 10.0
_CHANGE_TIMEOUT_S = 60.0  # adding and removing are asynchronous; measured 0.3 to 1.5 s


def router_argv(host: str, port: int, *, metrics_port: int, request_timeout_s: float) -> list[str]:
    """The router's command line. Its retries are few: the sampler retries too, elsewhere."""
    options = {
        "host": host,
        "port": port,
        "policy": "manual",
        "assignment-mode": "min_load",
        "max-idle-secs": 3600,
        "prometheus-host": host,
        "prometheus-port": metrics_port,
        "log-level": "error",
        # SGLang's /health generates a token behind a sleep of one second: be patient, and let the
        # circuit breaker find the dead.
        "health-check-interval-secs": 3,
        "health-check-timeout-secs": 20,
        "health-failure-threshold": 2,
        "health-success-threshold": 1,
        "retry-max-retries": 3,
        "cb-failure-threshold": 3,
        "cb-success-threshold": 1,
        "cb-timeout-duration-secs": 5,
        "request-timeout-secs": math.ceil(request_timeout_s),
        "shutdown-grace-period-secs": 1,
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "r1mega.rollout.router_main", *flags]


def write_router(folder: Path, url: str, pid: int) -> None:
    """Tell the learner where the router is; ``read_router`` is the other end."""
    entry = json.dumps({"url": url, "pid": pid}) + "\n"
    files.write_atomically(folder / _FILE, entry)


def read_router(folder: Path) -> "RouterClient":
    return RouterClient(json.loads((folder / _FILE).read_text())["url"])


@dataclass(frozen=True, slots=True)
class RouterClient:
    """The router's list of workers. ``RouterClient("http://127.0.0.1:30000").workers()``"""

    url: str

    def answers(self) -> bool:
        return control.answers(f"{self.url}/health", timeout_s=_CALL_TIMEOUT_S)

    def workers(self) -> dict[str, str]:
        """Engine URL -> the router's id of it."""
        listing = control.get(f"{self.url}/workers", timeout_s=_CALL_TIMEOUT_S)
        return {worker["url"]: worker["id"] for worker in listing["workers"]}

    def forward_exactly_to(self, urls: set[str]) -> None:
        """Add and remove workers until the router forwards to ``urls`` and to nothing else."""
        present = self.workers()
        for url in present.keys() - urls:
            self._remove(present[url])
        for url in urls - present.keys():
            self._add(url)
        self._wait_for(urls)

    def _add(self, url: str) -> None:
        # the engines' health is the fleet's business: it adds none that does not answer
        key = control.api_key()  # with which the router asks it for its health and model
        worker = {"url": url} if key is None else {"url": url, "api_key": key}
        control.post(f"{self.url}/workers", worker, timeout_s=_CALL_TIMEOUT_S)

    def _remove(self, worker_id: str) -> None:
        control.delete(f"{self.url}/workers/{quote(worker_id)}", timeout_s=_CALL_TIMEOUT_S)

    def _wait_for(self, urls: set[str]) -> None:
        deadline = time.monotonic() + _CHANGE_TIMEOUT_S
        while (present := self.workers().keys()) != urls:
            if time.monotonic() > deadline:
                raise CallFailed(
                    f"the router at {self.url} forwards to {sorted(present)} instead of "
                    f"{sorted(urls)} after {_CHANGE_TIMEOUT_S:.0f} s"
                )
            time.sleep(0.05)
