"""python -m r1mega.rollout.engine --model-path DIR --port P: serve a model on one CPU thread.

Flags are named as those of ``sglang.launch_server``.
"""

import argparse
import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from aiohttp import web
from tokenizers import Tokenizer

from r1mega.config import network
from r1mega.model.hf_config import model_from_hf
from r1mega.rollout import control
from r1mega.rollout.engine.application import application
from r1mega.rollout.engine.cache import Cache
from r1mega.rollout.engine.engine import Engine
from r1mega.rollout.engine.messages import Limits
from r1mega.rollout.engine.network import Network
from r1mega.rollout.engine.scheduler import Scheduler
from r1mega.rollout.engine.server import Identity, Routes
from r1mega.rollout.engine.updates import WeightUpdater
from r1mega.rollout.engine.weights import allocate, fill_random, load_folder
from r1mega.system import processes

logger = logging.getLogger(__name__)

_PREFIX_BYTES = 256 << 20


def parse_flags(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m r1mega.rollout.engine", description=__doc__)
    add = parser.add_argument
    add("--model-path", type=Path, required=True, help="Hugging Face folder with config.json")
    add("--host", default="127.0.0.1", help="other than loopback only with --api-key")
    add("--port", type=int, default=30000)
    add("--load-format", choices=("auto", "dummy"), default="auto", help="dummy: random weights")
    add("--random-seed", type=int, default=0, help="of the dummy weights")
    add("--max-running-requests", type=int, default=64)
    add("--context-length", type=int, help="prompt + response; default: the model's maximum")
    add("--chunked-prefill-size", type=int, default=512, help="prompt tokens per forward")
    add("--disable-radix-cache", action="store_true", help="compute equal prompts again")
    add("--enable-return-routed-experts", action="store_true", help="to requests that ask for them")
    add("--weight-version", default="default")
    add("--served-model-name")
    add("--api-key", default=control.api_key(), help=f"default: the variable {control.API_KEY}")
    add("--dist-timeout", type=float, default=120.0, help="seconds to wait for the trainer")
    return parser.parse_args(argv)


def check_flags(args: argparse.Namespace) -> None:
    if args.api_key is None and not processes.is_loopback(args.host):
        raise ValueError(
            f"--host {args.host} is reachable from outside: give an --api-key as well, or set "
            f"{control.API_KEY}"
        )
    if not (args.model_path / "config.json").is_file():
        raise ValueError(f"{args.model_path} has no config.json: give a Hugging Face model folder")
    for name in ("max_running_requests", "context_length", "chunked_prefill_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, it must be at least 1")


def _build(args: argparse.Namespace, on_death: Callable[[], object]) -> Routes:
    values = json.loads((args.model_path / "config.json").read_text())
    model = model_from_hf(values)
    if args.enable_return_routed_experts and network.is_dense(model):
        raise ValueError(f"--enable-return-routed-experts: {model.architecture} has no experts")
    context = args.context_length or model.max_position_embeddings
    weights = allocate(model)
    if args.load_format == "dummy":
        fill_random(weights, args.random_seed)
    else:
        load_folder(weights, args.model_path)
    cache = Cache(
        model,
        num_slots=args.max_running_requests,
        num_positions=context,
        prefix_bytes=_PREFIX_BYTES,
        records_experts=args.enable_return_routed_experts,
    )
    scheduler = Scheduler(
        Network(model, weights, context),
        cache,
        version=args.weight_version,
        prefill_tokens=args.chunked_prefill_size,
        reuse_prefixes=not args.disable_radix_cache,
    )
    tokenizer_file = args.model_path / "tokenizer.json"
    eos = values["eos_token_id"]
    return Routes(
        engine=Engine(scheduler, on_death=on_death),
        updater=WeightUpdater(weights, timeout_s=args.dist_timeout),
        weights=weights,
        limits=Limits(
            vocab_size=model.vocab_size,
            context_length=context,
            eos_token_ids=tuple(eos) if isinstance(eos, list) else (eos,),
            returns_routed_experts=cache.records_experts,
        ),
        identity=Identity(
            model_path=str(args.model_path),
            served_model_name=args.served_model_name or str(args.model_path),
            model_type=values["model_type"],
            architectures=values.get("architectures", []),
            load_format=args.load_format,
            host=args.host,
            port=args.port,
            max_running_requests=args.max_running_requests,
        ),
        tokenizer=Tokenizer.from_file(str(tokenizer_file)) if tokenizer_file.is_file() else None,
    )


async def _serve(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT (0) or until the engine thread dies (1)."""
    loop = asyncio.get_running_loop()
    stopped, died = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    routes = _build(args, partial(loop.call_soon_threadsafe, died.set))
    runner = web.AppRunner(
        application(routes, args.api_key), handler_cancellation=True, access_log=None
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, args.host, args.port).start()
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ValueError(
            f"cannot listen on {args.host}:{args.port}: {reason}; choose another --port"
        ) from error
    routes.engine.start()
    logger.info("serving %s on http://%s:%d", args.model_path, args.host, args.port)
    waits = [asyncio.ensure_future(event.wait()) for event in (stopped, died)]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    return 1 if died.is_set() else 0


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    torch.set_num_threads(1)
    args = parse_flags(sys.argv[1:])
    try:
        check_flags(args)
        code = asyncio.new_event_loop().run_until_complete(_serve(args))
    except ValueError as error:
        logger.error("%s", error)
        code = 1
    logging.shutdown()
    # A thread may sit in a broadcast or a join whose trainer is gone: do not wait for it.
    os._exit(code)


if __name__ == "__main__":
    main()
