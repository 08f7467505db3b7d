"""The engine thread: commands from the server and forward steps take turns on it.

Everything that touches requests, cache or weights runs here, between two steps. A command that
writes weights is *exclusive*: without a pause it waits until the requests before it are done, and
requests that come later wait for it.
"""

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from r1mega.rollout.engine.requests import Asked, Completion, Request
from r1mega.rollout.engine.scheduler import Scheduler

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Command:
    run: Callable[[], Any]
    future: "Future[Any]"
    exclusive: bool

    def execute(self) -> None:
        """A ValueError is the caller's mistake and goes back to him; anything else ends us."""
        try:
            result = self.run()
        except ValueError as error:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


class Engine:
    """Runs a scheduler on a thread of its own."""

    def __init__(self, scheduler: Scheduler, *, on_death: Callable[[], object]) -> None:
        self.scheduler = scheduler
        self._on_death = on_death
        self._inbox: queue.SimpleQueue[Command | Request] = queue.SimpleQueue()
        self._blocked: deque[Command | Request] = deque()  # an exclusive command and what follows
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def generate(self, asked: Asked) -> "Future[Completion]":
        future = _started_future()
        self._inbox.put(Request(asked, future))
        return future

    def call(self, run: Callable[[], Any], *, exclusive: bool = False) -> "Future[Any]":
        """Run a function between two steps; its result or ValueError arrives in the future."""
        future = _started_future()
        self._inbox.put(Command(run, future, exclusive))
        return future

    def abort(self, rid: str | None) -> int:
        """To be called on the engine thread: ends requests wherever they are."""
        for item in list(self._blocked):
            if isinstance(item, Request) and rid in (None, item.asked.rid, item.asked.parent_rid):
                self._blocked.remove(item)
                self.scheduler.add(item)
        return self.scheduler.abort(rid)

    def _main(self) -> None:
        torch.set_num_threads(1)
        try:
            with torch.inference_mode():
                while True:
                    self._turn()
        finally:
            logger.critical("the engine thread died")
            self._on_death()

    def _turn(self) -> None:
        """Take what has come, then make one step; sleep when there is nothing to do."""
        if not self.scheduler.can_step and not self._can_unblock():
            self._accept(self._inbox.get())
        while not self._inbox.empty():
            self._accept(self._inbox.get())
        while self._can_unblock():
            self._unblock()
        if self.scheduler.can_step:
            self.scheduler.step()

    def _accept(self, item: Command | Request) -> None:
        if isinstance(item, Request):
            if self._blocked:
                self._blocked.append(item)
            else:
                self.scheduler.add(item)
        elif item.exclusive:
            self._blocked.append(item)
        else:
            item.execute()

    def _can_unblock(self) -> bool:
        return bool(self._blocked) and (self.scheduler.paused or self.scheduler.idle)

    def _unblock(self) -> None:
        """Run the exclusive command in front, then let the requests behind it through."""
        item = self._blocked.popleft()
        assert isinstance(item, Command), item
        item.execute()
        while self._blocked and isinstance(request := self._blocked[0], Request):
            self._blocked.popleft()
            self.scheduler.add(request)


def _started_future() -> "Future[Any]":
    """A future that its waiter cannot cancel: a client that went away is aborted instead."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future
