"""Tokens per CPU second: the embedded engine over HTTP against transformers' generate, same model.

64 prompts of 16 tokens, 128 new tokens each, fp32, one thread on either side; CPU seconds, because
the engine is a process of its own. Prints one JSON line; the ratio is what to look at.
"""

import json
import os
import random
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ |= {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "PYTHONWARNINGS": "ignore"}

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from r1mega.config.schema import Model, RopeScaling
from r1mega.model.hf_config import hf_config
from r1mega.rollout import control
from r1mega.system import processes

MODEL = Model(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    moe_intermediate_size=96,
    kv_lora_rank=32,
    qk_rope_head_dim=16,
    max_position_embeddings=256,
    rope_scaling=RopeScaling(factor=4.0, original_max_position_embeddings=64),
)
BATCH, PROMPT_TOKENS, NEW_TOKENS = 64, 16, 128
REPEATS = 3


def main() -> None:
    rng = random.Random(1)
    prompts = [[rng.randrange(2, 512) for _ in range(PROMPT_TOKENS)] for _ in range(BATCH)]
    network = DeepseekV3ForCausalLM(DeepseekV3Config(**hf_config(MODEL, dtype="float32"))).eval()
    with TemporaryDirectory() as folder:
        network.save_pretrained(folder)
        ours = engine_rate(Path(folder), prompts)
    theirs = generate_rate(network, prompts)
    print(
        json.dumps(
            {
                "benchmark": "engine_tokens",
                "parameters": sum(p.numel() for p in network.parameters()),
                "engine_tokens_per_cpu_s": round(ours),
                "transformers_tokens_per_cpu_s": round(theirs),
                "ratio": round(ours / theirs, 2),
            }
        )
    )


def engine_rate(folder: Path, prompts: list[list[int]]) -> float:
    """Best of several batches, by the CPU time of the engine's process group."""
    port = processes.free_port("127.0.0.1")
    argv = [sys.executable, "-m", "r1mega.rollout.engine", "--model-path", str(folder)]
    argv += ["--host", "127.0.0.1", "--port", str(port), "--load-format", "auto"]
    argv += ["--max-running-requests", str(BATCH), "--context-length", "256"]
    process = processes.start(argv, name="engine", log=folder / "engine.log")
    url = f"http://127.0.0.1:{port}"
    sampling = {"max_new_tokens": NEW_TOKENS, "temperature": 1.0, "ignore_eos": True}
    body = {"input_ids": prompts, "sampling_params": sampling, "return_logprob": True}
    try:
        wait_for(url, folder / "engine.log")
        times = []
        for _ in range(1 + REPEATS):
            before = cpu_seconds(process.pid)
            control.post(f"{url}/generate", body, timeout_s=300)
            control.post(f"{url}/flush_cache", {}, timeout_s=30)
            times.append(cpu_seconds(process.pid) - before)
    finally:
        processes.end([process], grace_s=5)
    return BATCH * NEW_TOKENS / min(times[1:])


def generate_rate(network: DeepseekV3ForCausalLM, prompts: list[list[int]]) -> float:
    torch.set_num_threads(1)
    ids = torch.tensor(prompts)
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": True, "eos_token_id": None}
    times = []
    for _ in range(1 + REPEATS):
        before = time.process_time()
        network.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **settings)
        times.append(time.process_time() - before)
    return BATCH * NEW_TOKENS / min(times[1:])


def wait_for(url: str, log: Path, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not control.answers(f"{url}/health", timeout_s=5):
        if time.monotonic() > deadline:
            raise TimeoutError(f"the engine did not answer:\n{processes.last_lines(log)}")
        time.sleep(0.1)


def cpu_seconds(keeper_pid: int) -> float:
    """User and system time of the engine, which its keeper started."""
    tasks = Path(f"/proc/{keeper_pid}/task/{keeper_pid}/children").read_text().split()
    total = 0.0
    for pid in tasks:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


if __name__ == "__main__":
    main()
