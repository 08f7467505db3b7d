"""Do engines hold what the learner holds? Asked after every sync, of what arrived.

The learner's tensors are collected anew, laid out as an engine's ranks hold them (``predict``),
and their checksums compared with those that each engine computes of its own memory. ``probe`` then
finds what is no parameter. All ranks of the learner check alike; rank 0 knows the verdict.
"""

import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

from r1mega.rollout import control
from r1mega.rollout.broadcast import Stream
from r1mega.rollout.carrier import Failures
from r1mega.rollout.control import CallFailed
from r1mega.rollout.fleet import EngineHandle
from r1mega.rollout.predict import Parameter, predicted_checksums
from r1mega.rollout.probe import Probe

_SAMPLE_ONE_IN = 8
_AT_ONCE_BYTES = 1 << 30  # a second or two of hashing, however large the model


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What rank 0 found; on the others there is nothing to see."""

    failures: Failures = field(default_factory=dict)
    verified: int = 0
    probe_difference: float = 0.0
    probe_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Checksums:
    """Compares parameters: for each version a sample of another rank's, or all of all ranks.

    ``collect`` streams whole Hugging Face tensors to rank 0, those it is given the names of.
    """

    parameters: Callable[[int], tuple[Parameter, ...]]  # of a rank of any engine
    ranks_per_engine: int
    collect: Callable[[Sequence[str]], Stream]
    quantized: frozenset[str] = frozenset()  # of these tensors, which engines get in FP8
    scope: Literal["sample", "all"] = "sample"
    timeout_s: float = 600.0

    def compare(self, engines: Sequence[EngineHandle], version: int) -> tuple[int, Failures]:
        """How many parameters of each engine were compared, and who holds another value."""
        expected: dict[tuple[int, str], str] = {}
        for part in self._parts(version):
            expected |= predicted_checksums(part, self.collect, self.quantized)
        if not expected:  # not rank 0
            return 0, {}
        with ThreadPoolExecutor(len(engines)) as pool:
            found = pool.map(lambda engine: self._difference(engine, expected), engines)
            pairs = list(zip(engines, found, strict=True))
        return len(expected), {engine.url: why for engine, why in pairs if why is not None}

    def _parts(self, version: int) -> Iterator[list[Parameter]]:
        if self.scope == "sample":
            yield sample(self.parameters(version % self.ranks_per_engine), version)
            return
        for rank in range(self.ranks_per_engine):
            yield from _portions(self.parameters(rank))

    def _difference(
        self, engine: EngineHandle, expected: Mapping[tuple[int, str], str]
    ) -> str | None:
        url, body = f"{engine.url}/weights_checker", {"action": "checksum"}
        try:
            answer = control.post(url, body, timeout_s=self.timeout_s)
        except CallFailed as error:
            return str(error)
        bad = differing(answer.get("ranks") or [], expected)
        if not bad:
            return None
        rank, name = bad[0]
        return (
            f"it holds other values than were sent in {len(bad)} of {len(expected)} parameters "
            f"compared, the first is {name} on its rank {rank}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Proof:
    """Either part may be left out."""

    checksums: Checksums | None = None
    probe: Probe | None = None

    def check(self, engines: tuple[EngineHandle, ...], version: int) -> Verdict:
        """Collective: all ranks of the learner are given the same engines."""
        verified, failures = 0, Failures()
        if self.checksums is not None:
            verified, failures = self.checksums.compare(engines, version)
        if self.probe is None:
            return Verdict(failures=failures, verified=verified * len(engines))
        started = time.monotonic()
        differences, wrong = self.probe.check(engines, version)
        return Verdict(
            failures=wrong | failures,
            verified=verified * len(engines),
            probe_difference=max(differences.values(), default=0.0),
            probe_seconds=time.monotonic() - started,
        )


def differing(
    ranks: Sequence[Mapping[str, Any]], expected: Mapping[tuple[int, str], str]
) -> list[tuple[int, str]]:
    """Whose checksum is not the expected one, by rank and name, in an engine's answer.

    With several data-parallel ranks SGLang lists replicas, in any order: all of them have to agree.
    """
    held: dict[int, list[Mapping[str, str]]] = defaultdict(list)
    for rank in ranks:
        held[rank["parallelism_info"][0]["tp_rank"]].append(rank["checksums"])
    return [
        (rank, name)
        for (rank, name), value in expected.items()
        if {checksums.get(name) for checksums in held[rank]} != {value}
    ]


def sample(parameters: Sequence[Parameter], version: int) -> list[Parameter]:
    """One parameter, whatever its size, and of the others what fits in an eighth of all bytes, in
    a gigabyte at most. Their order is another one for each version, so that each comes first at
    times; small ones, such as expert biases and norms, are nearly always in."""

    def place(parameter: Parameter) -> bytes:
        return hashlib.sha256(f"{version}/{parameter.name}".encode()).digest()

    first, *others = sorted(parameters, key=place)
    left = min(_AT_ONCE_BYTES, sum(p.num_bytes for p in parameters) // _SAMPLE_ONE_IN)
    chosen = {first}
    for parameter in others:
        if parameter.num_bytes <= left:
            chosen.add(parameter)
            left -= parameter.num_bytes
    return [parameter for parameter in parameters if parameter in chosen]


def _portions(parameters: Sequence[Parameter]) -> Iterator[list[Parameter]]:
    """Consecutive ones that rank 0 can hold at once."""
    portion: list[Parameter] = []
    size = 0
    for parameter in parameters:
        if portion and size + parameter.num_bytes > _AT_ONCE_BYTES:
            yield portion
            portion, size = [], 0
        portion.append(parameter)
        size += parameter.num_bytes
    if portion:
        yield portion
