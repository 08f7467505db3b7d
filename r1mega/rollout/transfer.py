"""The collective group that carries weights: rank 0 of the learner, then one rank per engine.

It exists beside the learner's own groups. Invariant: no call here waits longer than the group's
timeout, whatever an engine does. An engine that refuses a call is told to leave the group, and we
leave it when a broadcast breaks: either way the closed connections end everybody else's wait.
"""

import uuid
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any

import torch.distributed as dist
from torch import Tensor

from r1mega.rollout import control
from r1mega.rollout.control import CallFailed
from r1mega.rollout.wire import join_group
from r1mega.system import processes

_JOIN_TIMEOUT_S = 60.0

Failures = dict[str, str]  # engine URL -> what it did wrong


class TransferFailed(Exception):
    """The group is broken. ``failures`` may name an engine that only saw another one die."""

    def __init__(self, failures: Failures, summary: str = "") -> None:
        super().__init__(next(iter(failures.values()), summary))
        self.failures = failures


class Transfer:
    """A joined group of engines, ready to receive buckets."""

    def __init__(
        self, urls: tuple[str, ...], *, name: str, timeout_s: float, group: dist.ProcessGroup
    ) -> None:
        self.urls = urls
        self._name = name
        self._timeout_s = timeout_s
        self._group: dist.ProcessGroup | None = group

    def send(self, bucket: Sequence[tuple[str, Tensor]], *, version: int | None) -> None:
        """Broadcast ``bucket`` to all engines; ``version`` comes with the last one."""
        body = _update_body(bucket, self._name, version)
        with ThreadPoolExecutor(len(self.urls)) as pool:
            answers = {url: pool.submit(self._announce, url, body) for url in self.urls}
            broken = self._broadcast([tensor for _, tensor in bucket])
            if broken is not None:
                self.close()  # before waiting for the engines, which wait for us
        failures = {url: why for url, answer in answers.items() if (why := answer.result())}
        if broken is not None or failures:
            raise TransferFailed(failures, broken or "")

    def _announce(self, url: str, body: dict[str, Any]) -> str | None:
        try:
            control.post(
                f"{url}/update_weights_from_distributed", body, timeout_s=self._timeout_s + 10
            )
        except CallFailed as error:
            self._ask_to_leave([url])
            return str(error)
        return None

    def _broadcast(self, tensors: list[Tensor]) -> str | None:
        try:
            # all in flight at once: the latency of one, not of each
            works = [
                dist.broadcast(tensor, src=0, group=self._group, async_op=True)
                for tensor in (tensor.contiguous() for tensor in tensors)
            ]
            for work in works:
                work.wait()
        except RuntimeError as error:  # what torch.distributed raises for a lost peer or a timeout
            return f"the broadcast to the engines broke: {error}"
        return None

    def leave(self) -> None:
        """Dissolve the group; engines that no longer answer are left alone."""
        self._ask_to_leave(self.urls)
        self.close()

    def close(self) -> None:
        """Close our connections: gloo does so only when the last reference to the group is gone."""
        group, self._group = self._group, None
        if group is not None:
            dist.destroy_process_group(group)

    def _ask_to_leave(self, urls: Sequence[str]) -> None:
        body = {"group_name": self._name}
        timeout_s = min(10.0, self._timeout_s)
        control.post_each(urls, "/destroy_weights_update_group", body, timeout_s=timeout_s)


def join(urls: Sequence[str], *, host: str, backend: str, timeout_s: float) -> Transfer:
    """Make the group: each engine joins on request while we wait for it as rank 0."""
    name = f"weights-{uuid.uuid4().hex[:12]}"
    port = processes.free_port(host)
    bodies = [
        {
            "master_address": host,
            "master_port": port,
            "rank_offset": 1 + index,
            "world_size": 1 + len(urls),
            "group_name": name,
            "backend": backend,
        }
        for index in range(len(urls))
    ]
    pool = ThreadPoolExecutor(1 + len(urls))
    joined = pool.submit(
        join_group,
        address=host,
        port=port,
        rank=0,
        world_size=1 + len(urls),
        name=name,
        backend=backend,
        join_timeout_s=_JOIN_TIMEOUT_S,
        timeout_s=timeout_s,
    )
    answers = {
        url: pool.submit(
            control.post, f"{url}/init_weights_update_group", body, timeout_s=_JOIN_TIMEOUT_S + 10
        )
        for url, body in zip(urls, bodies, strict=True)
    }
    # An engine that refuses leaves us waiting for it in the join: the first failure ends the wait,
    # and the threads that still wait end by their timeouts.
    pending: list[Future[Any]] = [joined, *answers.values()]
    wait(pending, return_when=FIRST_EXCEPTION)
    pool.shutdown(wait=False)
    failures = {url: str(e) for url, answer in answers.items() if (e := _failure_of(answer))}
    broken = _failure_of(joined)
    if failures or broken is not None:
        raise TransferFailed(failures, f"no group with {len(urls)} engines: {broken}")
    return Transfer(tuple(urls), name=name, timeout_s=timeout_s, group=joined.result())


def _failure_of(future: "Future[Any]") -> BaseException | None:
    return future.exception() if future.done() else None


def _update_body(
    bucket: Sequence[tuple[str, Tensor]], group_name: str, version: int | None
) -> dict[str, Any]:
    body: dict[str, Any] = {
        "names": [name for name, _ in bucket],
        "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
        "shapes": [list(tensor.shape) for _, tensor in bucket],
        "group_name": group_name,
        "flush_cache": True,
    }
    return body if version is None else {**body, "weight_version": str(version)}
