"""What publishing knows of a way for weights to reach engines; one module each implements it.

All ranks of the learner call a carrier alike. It moves weights and nothing else: who is asked, what
became of an engine that failed and what it holds in the end is ``publish``'s and ``proof``'s.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from r1mega.rollout import control
from r1mega.rollout.fleet import EngineHandle

Failures = dict[str, str]  # engine URL -> what it did wrong


class CarryFailed(Exception):
    """Weights are half there. ``failures`` may name an engine that only saw another one die."""

    def __init__(self, failures: Failures, summary: str = "") -> None:
        super().__init__(next(iter(failures.values()), summary))
        self.failures = failures


@dataclass(frozen=True, kw_only=True, slots=True)
class Carried:
    """What arrived at engines, over all their ranks, as far as this learner rank sent it."""

    bytes: int = 0
    point_to_point_bytes: int = 0  # of those, sent to nobody else


class Carrier(Protocol):
    """broadcast.Broadcast, disk.Disk and p2p's."""

    def carry(self, engines: tuple[EngineHandle, ...], version: int) -> Carried:
        """Set all weights of all ``engines``, which label them ``version`` once all are there.

        Collective. Raises CarryFailed on any rank that sees it fail, and there only after this rank
        has done its part in whatever other ranks of the learner wait for.
        """

    def abandon(self) -> None:
        """Forget every group there is with engines; after a failure, and at the end."""


def post_all(
    engines: Sequence[EngineHandle],
    route: str,
    body: Mapping[str, Any] | None = None,
    *,
    timeout_s: float,
) -> None:
    """The same POST to every engine at once; raises CarryFailed."""
    urls = [engine.url for engine in engines]
    if failures := control.post_each(urls, route, body or {}, timeout_s=timeout_s):
        raise CarryFailed(failures)
