"""Whole tensors from rank 0 of the learner to every engine: works with an unmodified SGLang.

Rank 0 collects each distinct rectangle once and sends whole tensors, in buckets, over a group of it
and the engines' ranks, as SGLang 0.5.23 demands: join, /begin_weight_update, one call a bucket with
the version on the last, /end_weight_update. While a bucket is on its way the next is collected.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import groupby
from operator import itemgetter

from torch import Tensor

from r1mega.rollout import transfer
from r1mega.rollout.carrier import Carried, post_all
from r1mega.rollout.fleet import EngineHandle
from r1mega.rollout.transfer import Bucket, Sending, Transfer
from r1mega.weights import fp8
from r1mega.weights.blocks import scale_name, weight_name

# Whole Hugging Face tensors on rank 0, None elsewhere; every rank has to read it to the end.
Stream = Iterator[tuple[str, Tensor | None]]


class Broadcast:
    """A ``Carrier``. It keeps its group while the engines stay the same.

    ``stream`` is what engines are to hold, anew at every call; ``ranks_per_engine`` their tp size.
    """

    def __init__(
        self,
        stream: Callable[[], Stream],
        *,
        is_root: bool,
        bucket_bytes: int,
        ranks_per_engine: int = 1,
        host: str = "127.0.0.1",
        backend: str = "gloo",
        timeout_s: float = 600.0,
    ) -> None:
        self._stream = stream
        self._is_root = is_root
        self._bucket_bytes = bucket_bytes
        self._ranks_per_engine = ranks_per_engine
        self._host = host
        self._backend = backend
        self._timeout_s = timeout_s
        self._transfer: Transfer | None = None

    def carry(self, engines: tuple[EngineHandle, ...], version: int) -> Carried:
        stream = self._stream()
        try:
            if not self._is_root:
                return Carried()
            return self._send(engines, version, buckets(_present(stream), self._bucket_bytes))
        finally:
            for _ in stream:  # the other ranks of the learner are in it
                pass

    def abandon(self) -> None:
        if self._transfer is not None:
            self._transfer.leave()
            self._transfer = None

    def join(self, engines: tuple[EngineHandle, ...]) -> Transfer:
        """The group with exactly ``engines``: the one there is, or a new one."""
        urls = tuple(engine.url for engine in engines)
        if self._transfer is None or self._transfer.urls != urls:
            self.abandon()
            self._transfer = transfer.join(
                urls,
                ranks_per_engine=self._ranks_per_engine,
                host=self._host,
                backend=self._backend,
                timeout_s=self._timeout_s,
            )
        return self._transfer

    def _send(
        self, engines: tuple[EngineHandle, ...], version: int, parts: Iterator[tuple[Bucket, bool]]
    ) -> Carried:
        group = self.join(engines)
        post_all(engines, "/begin_weight_update", timeout_s=self._timeout_s)
        sending: Sending | None = None
        num_bytes = 0
        for bucket, is_last in parts:
            if sending is not None:
                sending.wait()
            sending = group.send(bucket, version=version if is_last else None)
            num_bytes += sum(tensor.nbytes for _, tensor in bucket)
        if sending is not None:
            sending.wait()
        post_all(engines, "/end_weight_update", timeout_s=self._timeout_s)
        return Carried(bytes=num_bytes * self._ranks_per_engine * len(engines))


def buckets(
    tensors: Iterable[tuple[str, Tensor]], bucket_bytes: int
) -> Iterator[tuple[Bucket, bool]]:
    """Consecutive units of at most ``bucket_bytes`` together, and whether there is no more; a
    larger unit goes alone."""
    bucket: Bucket = []
    size = 0
    for _, members in groupby(tensors, key=lambda item: _unit(item[0])):
        unit = list(members)
        unit_size = sum(tensor.nbytes for tensor in map(itemgetter(1), unit))
        if bucket and size + unit_size > bucket_bytes:
            yield bucket, False
            bucket, size = [], 0
        bucket += unit
        size += unit_size
    if bucket:
        yield bucket, True


def _unit(name: str) -> str:
    """Tensors of one unit must come in one call.

    SGLang joins ``q_a_proj`` with ``kv_a_proj_with_mqa`` within a call and drops the half that
    comes alone; it derives MLA's absorbed matrices from ``kv_b_proj``, codes and scales, at its end
    (deepseek_weight_loader.py).
    """
    before, attention, _ = name.partition(".self_attn.")
    return before + attention if attention else weight_name(name) or name


def _present(tensors: Stream) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        if tensor is None:
            raise ValueError(f"rank 0 publishes, but it has no tensor for {name}")
        yield name, tensor


def quantized(tensors: Stream, names: Collection[str]) -> Stream:
    """The same with codes and scales in place of ``names``."""
    for name, tensor in tensors:
        if name not in names:
            yield name, tensor
            continue
        codes, scales = (None, None) if tensor is None else fp8.quantize(tensor)
        yield name, codes
        yield scale_name(name), scales
