"""One weight sync to two engines, by broadcast and by disk, against moving the same bytes bare.

Two learner ranks hold half of every tensor that tensor parallelism cuts; two embedded engines load
the whole policy (bf16, dequantised by the receiver in the FP8 case). Bare: one flat tensor of as
many bytes, broadcast by the same backend (gloo) to two processes that do nothing with it; and one
file of as many bytes, written by one process and read by two. So "over bare" is what collecting,
calls, buckets and loading cost. The proof is timed by itself. Prints one JSON line; medians.

    python benchmarks/publish.py
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

os.environ |= {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "PYTHONWARNINGS": "ignore"}

import torch
import torch.distributed as dist

from r1mega.config.schema import Model
from r1mega.data.tokenizer import save_tokenizer
from r1mega.model.hf_config import hf_config
from r1mega.parallel.collectives import Team
from r1mega.parallel.layout import Layout
from r1mega.rollout import control
from r1mega.rollout.broadcast import Broadcast, quantized
from r1mega.rollout.carrier import Carrier
from r1mega.rollout.checksum import cpu_checksum
from r1mega.rollout.disk import Disk
from r1mega.rollout.fleet import EngineHandle
from r1mega.rollout.predict import engine_parameters
from r1mega.rollout.proof import Checksums
from r1mega.rollout.wire import join_group
from r1mega.system.processes import free_port
from r1mega.weights.collect import hf_tensors
from r1mega.weights.engine_names import EngineLayout
from r1mega.weights.local import random_region
from r1mega.weights.names import fp8_weights, hf_shapes

MODEL = Model(
    vocab_size=16_384,
    hidden_size=512,
    intermediate_size=2048,
    moe_intermediate_size=256,
    num_hidden_layers=8,
    num_attention_heads=8,
    q_lora_rank=256,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    n_routed_experts=32,
)
BUCKET_BYTES = 16 << 20  # what memory of a CPU takes best
ENGINES = 2
REPEATS = 5
TIMEOUT_S = 120.0


def main() -> None:
    with TemporaryDirectory() as scratch, ExitStack() as stack:
        folder, port = Path(scratch), str(free_port("127.0.0.1"))
        model_folder(folder / "model")
        urls = [start_engine(stack, folder / "model") for _ in range(ENGINES)]
        stack.enter_context(started("rank", "1", port, scratch, *urls))
        print(json.dumps({"benchmark": "publish"} | rank("0", port, scratch, *urls)))


def rank(number: str, port: str, scratch: str, *urls: str) -> dict[str, object]:
    """One of two learner ranks; what it measured."""
    sys.path.insert(0, str(Path(__file__).parents[1]))  # for the weights of tests
    from tests.distributed.shards import filled_shard

    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=int(number),
        world_size=2,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    engines = tuple(
        EngineHandle(name=f"engine-{i}", url=url, pid=0, incarnation=0)
        for i, url in enumerate(urls)
    )
    folder, team = Path(scratch), Team(dist.group.WORLD)
    policy = random_region(seed=1, std=0.02)
    weights = filled_shard(MODEL, Layout(world=2, tp=2), int(number), policy, torch.bfloat16)
    names = list(hf_shapes(MODEL))
    fp8 = fp8_weights(MODEL)
    collect = partial(hf_tensors, weights, device=torch.device("cpu"))
    carrier = partial(Broadcast, is_root=team.is_root, bucket_bytes=BUCKET_BYTES)
    carriers: dict[str, Carrier] = {
        "broadcast": carrier(lambda: collect(names)),
        "broadcast_fp8": carrier(lambda: quantized(collect(names), fp8)),
        "disk": Disk(
            weights, names, folder=folder / "versions", companions=folder / "model", team=team
        ),
    }
    seconds: dict[str, list[float]] = {}
    sizes: dict[str, int] = {}
    for version in range(REPEATS + 1):
        for name, way in carriers.items():
            started_at = time.perf_counter()
            sizes[name] = way.carry(engines, version).bytes // ENGINES
            seconds.setdefault(name, []).append(time.perf_counter() - started_at)
            if team.is_root:
                bare = bare_broadcast if isinstance(way, Broadcast) else partial(bare_file, folder)
                seconds.setdefault(f"bare_{name}", []).append(bare(sizes[name]))
            team.told(True, bool)
    checksums = Checksums(
        parameters=partial(
            engine_parameters,
            MODEL,
            EngineLayout(fused=False),
            dtype=torch.float32,
            checksum=cpu_checksum,
        ),
        ranks_per_engine=1,
        collect=collect,
        scope="all",
    )
    started_at = time.perf_counter()
    verified, failures = checksums.compare(engines, REPEATS)
    proof_s = time.perf_counter() - started_at
    assert not failures, failures
    return summary(seconds, sizes) | {"verify_all_s": round(proof_s, 2), "verified": verified}


def summary(seconds: dict[str, list[float]], sizes: dict[str, int]) -> dict[str, object]:
    """The first round, which joins groups and fills caches, does not count."""
    result: dict[str, object] = {}
    for name, size in sizes.items():
        if (bare := seconds.get(f"bare_{name}")) is None:
            continue
        result |= {
            f"{name}_mb": round(size / 1e6, 1),
            f"{name}_gb_per_s": round(size / 1e9 / median(seconds[name][1:]), 3),
            f"{name}_bare_gb_per_s": round(size / 1e9 / median(bare[1:]), 3),
            f"{name}_over_bare": round(median(bare[1:]) / median(seconds[name][1:]), 2),
        }
    return result


def bare_broadcast(num_bytes: int) -> float:
    """Seconds of one flat broadcast to as many processes as there are engines."""
    port = str(free_port("127.0.0.1"))
    with ExitStack() as stack:
        for index in range(ENGINES):
            stack.enter_context(started("receive", str(1 + index), port, str(num_bytes)))
        return receive("0", port, str(num_bytes))


def receive(number: str, port: str, num_bytes: str) -> float:
    group = join_group(
        address="127.0.0.1",
        port=int(port),
        rank=int(number),
        world_size=1 + ENGINES,
        name="bare",
        backend="gloo",
        join_timeout_s=TIMEOUT_S,
        timeout_s=TIMEOUT_S,
    )
    values = torch.ones(int(num_bytes), dtype=torch.uint8)
    dist.broadcast(values[:1], src=0, group=group)  # all are there, and connected
    started_at = time.perf_counter()
    dist.broadcast(values, src=0, group=group)
    dist.broadcast(values[:1], src=0, group=group)
    seconds = time.perf_counter() - started_at
    dist.destroy_process_group(group)
    return seconds


def bare_file(folder: Path, num_bytes: int) -> float:
    """Seconds to write so many bytes and read them once for each engine, one after the other."""
    values = memoryview(bytearray(num_bytes))
    started_at = time.perf_counter()
    (folder / "bare").write_bytes(values)
    for _ in range(ENGINES):
        with (folder / "bare").open("rb", buffering=0) as file:
            file.readinto(values)
    return time.perf_counter() - started_at


def model_folder(folder: Path) -> None:
    save_tokenizer("arithmetic", folder)
    (folder / "config.json").write_text(json.dumps(hf_config(MODEL)))


def start_engine(stack: ExitStack, folder: Path) -> str:
    """Its URL, once it answers."""
    port = free_port("127.0.0.1")
    url = f"http://127.0.0.1:{port}"
    argv = [sys.executable, "-m", "r1mega.rollout.engine", "--model-path", str(folder)]
    argv += ["--port", str(port), "--load-format", "dummy", "--context-length", "64"]
    process = subprocess.Popen([*argv, "--max-running-requests", "2"], stderr=subprocess.DEVNULL)
    stack.callback(process.wait)
    stack.callback(process.kill)
    wait_for(lambda: control.answers(f"{url}/health", timeout_s=5))
    return url


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("an engine did not start")
        time.sleep(0.1)


def started(*arguments: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, __file__, *arguments])


if __name__ == "__main__":
    if not sys.argv[1:]:
        main()
    else:
        {"rank": rank, "receive": receive}[sys.argv[1]](*sys.argv[2:])
        os._exit(0)  # gloo's threads need not be joined
