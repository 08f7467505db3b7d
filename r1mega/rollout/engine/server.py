"""HTTP routes of SGLang 0.5.23 over one engine.

Answers: /generate gives a completion or a list; updates give {"success", "message"}; a mistake of
the caller is status 400 with one sentence. /weights_checker answers as SGLang does on a CPU, with
the checksums of float32 values under Hugging Face's names.
"""

import asyncio
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from aiohttp import web
from tokenizers import Tokenizer

from r1mega.rollout.engine import messages
from r1mega.rollout.engine.engine import Engine
from r1mega.rollout.engine.requests import Completion
from r1mega.rollout.engine.updates import Payload, WeightUpdater
from r1mega.rollout.engine.weights import Weights, checksums, load_folder

SGLANG_VERSION = "0.5.23"  # whose API this is
_HEALTH_TIMEOUT_S = 20.0
_PLACE = {"role": "target", "rank": 0, "size": 1} | {
    f"{axis}_{what}": value
    for axis in ("tp", "dp", "pp")
    for what, value in (("rank", 0), ("size", 1))
}

Body = TypeVar("Body", bound=msgspec.Struct)


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """What /model_info and /server_info tell beside the live state."""

    model_path: str
    served_model_name: str
    model_type: str
    architectures: list[str]
    load_format: str
    host: str
    port: int
    max_running_requests: int


@dataclass(frozen=True, kw_only=True)
class Routes:
    """The handlers; all state lives in the engine and the updater."""

    engine: Engine
    updater: WeightUpdater
    weights: Weights
    limits: messages.Limits
    identity: Identity
    tokenizer: Tokenizer | None
    in_flight: set[str] = field(default_factory=set)

    # Generation

    async def generate(self, request: web.Request) -> web.Response:
        started = time.monotonic()
        body = await _body(request, messages.GenerateBody)
        wanted, is_list = messages.parse_generate(body, self.limits)
        rids = {one.asked.rid for one in wanted}
        if rids & self.in_flight:
            raise ValueError(f"rid {min(rids & self.in_flight)!r} is in use by a running request")
        self.in_flight.update(rids)
        futures = [self.engine.generate(one.asked) for one in wanted]
        try:
            completions = await asyncio.gather(*map(asyncio.wrap_future, futures))
        except asyncio.CancelledError:  # the client went away
            for rid in rids:
                self.engine.call(partial(self.engine.abort, rid))
            raise
        finally:
            self.in_flight.difference_update(rids)
        latency_s = time.monotonic() - started
        answers = [
            messages.answer(
                completion,
                self._text(completion, one),
                return_logprob=one.return_logprob,
                latency_s=latency_s,
            )
            for completion, one in zip(completions, wanted, strict=True)
        ]
        return json_answer(answers if is_list else answers[0])

    def _text(self, completion: Completion, wanted: messages.Wanted) -> str:
        if self.tokenizer is None:
            return ""
        token_ids = list(completion.token_ids)
        if completion.finish.kind == "stop" and not wanted.keep_stop:
            token_ids.pop()
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=wanted.skip_special))

    async def abort_request(self, request: web.Request) -> web.Response:
        body = await _body(request, messages.AbortBody)
        rid = None if body.abort_all else (body.rid or "")
        await self._on_engine(partial(self.engine.abort, rid))
        return web.Response()

    async def pause_generation(self, request: web.Request) -> web.Response:
        mode = (await _body(request, messages.PauseBody)).mode

        def pause() -> None:
            self.engine.scheduler.pause(mode)
            if mode == "abort":
                self.engine.abort(None)

        await self._on_engine(pause)
        return json_answer({"message": "Generation paused successfully.", "status": "ok"})

    async def continue_generation(self, request: web.Request) -> web.Response:
        await self._on_engine(self.engine.scheduler.resume)
        return json_answer({"message": "Generation continued successfully.", "status": "ok"})

    async def flush_cache(self, request: web.Request) -> web.Response:
        if await self._on_engine(self.engine.scheduler.flush_cache):
            return web.Response(text="Cache flushed.\n")
        text = "The cache was not flushed because requests are running or waiting.\n"
        return web.Response(text=text, status=400)

    # Weights

    async def begin_weight_update(self, request: web.Request) -> web.Response:
        return await self._update(self.updater.begin)

    async def end_weight_update(self, request: web.Request) -> web.Response:
        return await self._update(self.updater.end)

    async def init_weights_update_group(self, request: web.Request) -> web.Response:
        """Not on the engine thread: it waits for others to join, and requests go on meanwhile."""
        body = await _body(request, messages.InitGroupBody)
        join = partial(
            self.updater.init_group,
            address=body.master_address,
            port=body.master_port,
            rank=body.rank_offset,
            world_size=body.world_size,
            name=body.group_name,
            backend=body.backend,
        )
        return await _outcome(asyncio.to_thread(join))

    async def destroy_weights_update_group(self, request: web.Request) -> web.Response:
        body = await _body(request, messages.DestroyGroupBody)
        return await self._update(partial(self.updater.destroy_group, body.group_name))

    async def update_weights_from_distributed(self, request: web.Request) -> web.Response:
        body = await _body(request, messages.UpdateBody)
        payload = Payload(
            names=body.names,
            dtypes=body.dtypes,
            shapes=body.shapes,
            load_format=body.load_format,
        )
        receive = partial(self.updater.receive, payload, body.group_name)
        return await self._write_weights(body, receive)

    async def update_weights_from_disk(self, request: web.Request) -> web.Response:
        body = await _body(request, messages.UpdateFromDiskBody)
        return await self._write_weights(
            body, partial(load_folder, self.weights, Path(body.model_path))
        )

    async def update_weights_from_peers(self, request: web.Request) -> web.Response:
        body = await _body(request, messages.UpdateFromPeersBody)
        receive = partial(self.updater.receive_from_peers, body.invitation)
        return await self._write_weights(body, receive)

    async def update_weight_version(self, request: web.Request) -> web.Response:
        body = await _body(request, messages.UpdateVersionBody)
        if body.abort_all_requests:
            await self._on_engine(partial(self.engine.abort, None))
        relabel = partial(self.engine.scheduler.set_version, body.new_version)
        return await self._update(relabel, exclusive=True)

    async def _write_weights(
        self,
        body: messages.UpdateBody | messages.UpdateFromDiskBody | messages.UpdateFromPeersBody,
        write: Callable[[], None],
    ) -> web.Response:
        """Write, label, flush; as in SGLang a refused flush is an error *after* the update."""

        def update() -> None:
            write()
            if body.weight_version is not None:
                self.engine.scheduler.set_version(body.weight_version)
            if body.flush_cache and not self.engine.scheduler.flush_cache():
                raise ValueError(
                    "the weights were updated, but the cache was not flushed because requests are "
                    "running: pause with mode retract or abort, then call /flush_cache"
                )

        if body.abort_all_requests:
            await self._on_engine(partial(self.engine.abort, None))
        return await self._update(update, exclusive=True)

    async def weights_checker(self, request: web.Request) -> web.Response:
        body = await _body(request, messages.WeightsCheckerBody)
        skip = body.skip_tensor_list or ()
        by_name = await self._on_engine(lambda: dict(checksums(self.weights, skip)))
        overall = hashlib.sha256()
        for name in sorted(by_name):
            overall.update(name.encode() + by_name[name].encode())
        rank = {
            "checksums": by_name,
            "per_gpu_checksum": overall.hexdigest(),
            "parallelism_info": [_PLACE],
        }
        per_engine = hashlib.sha256(overall.hexdigest().encode()).hexdigest()
        return json_answer(
            {
                "success": True,
                "message": "Success.",
                "ranks": [rank],
                "per_engine_checksum": per_engine,
            }
        )

    async def get_weights_by_name(self, request: web.Request) -> web.Response:
        """The first rows, as SGLang answers for Llama; it has no such answer for DeepSeek-V3."""
        if request.method == "GET" and not request.can_read_body:
            body = _query(request, messages.GetWeightsBody)
        else:
            body = await _body(request, messages.GetWeightsBody)

        def read() -> list[Any]:
            if body.name not in self.weights.named:
                raise ValueError(f"there is no parameter {body.name!r} in this model")
            return list(self.weights.named[body.name][: body.truncate_size].tolist())

        return json_answer(await self._on_engine(read))

    # State

    async def health(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if self.engine.alive else 503)

    async def health_generate(self, request: web.Request) -> web.Response:
        """One token through the engine, unless it is at work anyway (or paused)."""
        scheduler = self.engine.scheduler
        if self.engine.alive and scheduler.idle and not scheduler.paused:
            params = messages.SamplingParams(max_new_tokens=1, temperature=0.0)
            body = messages.GenerateBody(input_ids=[0], sampling_params=params)
            (wanted,), _ = messages.parse_generate(body, self.limits)
            probe = self.engine.generate(wanted.asked)
            try:
                await asyncio.wait_for(asyncio.wrap_future(probe), _HEALTH_TIMEOUT_S)
            except TimeoutError:
                return web.Response(status=503)
        return await self.health(request)

    async def model_info(self, request: web.Request) -> web.Response:
        identity = self.identity
        return json_answer(
            {
                "model_path": identity.model_path,
                "served_model_name": identity.served_model_name,
                "tokenizer_path": identity.model_path,
                "is_generation": True,
                "preferred_sampling_params": None,
                "weight_version": self.engine.scheduler.version,
                "load_format": identity.load_format,
                "model_type": identity.model_type,
                "architectures": identity.architectures,
            }
        )

    async def server_info(self, request: web.Request) -> web.Response:
        identity = self.identity
        max_total_tokens = identity.max_running_requests * self.limits.context_length
        return json_answer(
            {
                "model_path": identity.model_path,
                "served_model_name": identity.served_model_name,
                "tokenizer_path": identity.model_path,
                "host": identity.host,
                "port": identity.port,
                "max_context_length": self.limits.context_length,
                "context_length": self.limits.context_length,
                "max_running_requests": identity.max_running_requests,
                "max_total_num_tokens": max_total_tokens,
                "dp_size": 1,
                "tp_size": 1,
                "version": SGLANG_VERSION,
                "frontend": "r1mega embedded engine",
                "disaggregation_mode": "null",
                "internal_states": [self._load()],
            }
        )

    async def loads(self, request: web.Request) -> web.Response:
        return json_answer({"version": SGLANG_VERSION, "loads": [{"dp_rank": 0, **self._load()}]})

    def _load(self) -> dict[str, Any]:
        scheduler = self.engine.scheduler
        running, waiting = len(scheduler.running), len(scheduler.waiting)
        return {
            "num_running_reqs": running,
            "num_waiting_reqs": waiting,
            "num_total_reqs": running + waiting,
            "max_running_requests": self.identity.max_running_requests,
            "paused": scheduler.paused,
        }

    async def _on_engine(self, run: Callable[[], Any], *, exclusive: bool = False) -> Any:
        return await asyncio.wrap_future(self.engine.call(run, exclusive=exclusive))

    async def _update(self, run: Callable[[], None], *, exclusive: bool = False) -> web.Response:
        return await _outcome(self._on_engine(run, exclusive=exclusive))


async def _outcome(update: Any) -> web.Response:
    try:
        await update
    except ValueError as error:
        return json_answer({"success": False, "message": str(error)}, status=400)
    return json_answer({"success": True, "message": "Success."})


async def _body(request: web.Request, kind: type[Body]) -> Body:
    """The request's JSON as this message; an empty body is an empty object."""
    try:
        return msgspec.json.decode(await request.read() or b"{}", type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ValueError(f"bad request body: {error}") from error


def _query(request: web.Request, kind: type[Body]) -> Body:
    try:
        return msgspec.convert(dict(request.query), kind, strict=False)
    except msgspec.ValidationError as error:
        raise ValueError(f"bad query: {error}") from error


def json_answer(value: Any, status: int = 200) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(value), status=status, content_type="application/json"
    )
