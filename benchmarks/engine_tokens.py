"""Tokens per CPU second: the embedded engine over HTTP against transformers' generate, same model.

A batch of 64 responses of 128 tokens, fp32, one thread on either side: to 64 prompts of 16 tokens,
or to 8 prompts of 64 tokens with 8 samples each, as GRPO asks. CPU seconds, because the engine is a
process of its own; the two take turns, and the best turn of each counts. The engine's log-probs
must equal those of transformers' forward to 1e-5 in all responses but one at most, where a router
may be undecided to the last bit. Prints one JSON line per case; the ratio is what to look at.
"""

import json
import math
import os
import random
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "PYTHONWARNINGS": "ignore"}

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from r1mega.config.schema import Model, RopeScaling
from r1mega.model.hf_config import hf_config
from r1mega.rollout import control
from r1mega.system import processes

YARN = RopeScaling(factor=4.0, original_max_position_embeddings=64)
MODELS = {
    "DeepSeek-V3, 1.3M": Model(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=96,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        max_position_embeddings=256,
        rope_scaling=YARN,
    ),
    "DeepSeek-V3, 20M": Model(
        vocab_size=2048,
        hidden_size=384,
        intermediate_size=768,
        moe_intermediate_size=160,
        num_hidden_layers=6,
        num_attention_heads=8,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=16,
        max_position_embeddings=256,
        rope_scaling=YARN,
    ),
    "Qwen2, 1M": Model(
        architecture="qwen2",
        vocab_size=512,
        hidden_size=128,
        intermediate_size=384,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    ),
}
BATCH, NEW_TOKENS = 64, 128
SAMPLES = {1: 16, 8: 64}  # samples of one prompt -> prompt tokens
TURNS = 4


def main() -> None:
    torch.set_num_threads(1)
    for name, model in MODELS.items():
        torch.manual_seed(1)
        config = AutoConfig.for_model(**hf_config(model))
        network = AutoModelForCausalLM.from_config(config).eval()
        with TemporaryDirectory() as folder, engine(network, Path(folder)) as (url, pid):
            for samples, prompt_tokens in SAMPLES.items():
                about = {
                    "benchmark": "engine_tokens",
                    "model": name,
                    "parameters": sum(p.numel() for p in network.parameters()),
                    "samples_per_prompt": samples,
                    "prompt_tokens": prompt_tokens,
                }
                rng = random.Random(1)
                prompts = [
                    [rng.randrange(2, model.vocab_size) for _ in range(prompt_tokens)]
                    for _ in range(BATCH // samples)
                ]
                print(json.dumps(about | compare(network, url, pid, prompts, samples)), flush=True)


def compare(
    network: Any, url: str, pid: int, prompts: list[list[int]], samples: int
) -> dict[str, float]:
    """The two take turns; the best turn of each counts."""
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    difference = logprob_difference(network, repeated, ask(url, prompts, samples))
    assert difference < 1e-5, f"log-probs differ by {difference} from those of transformers"
    ours_s, theirs_s = math.inf, math.inf
    for _ in range(TURNS):
        before = cpu_seconds(pid)
        ask(url, prompts, samples)
        ours_s = min(ours_s, cpu_seconds(pid) - before)
        before = time.process_time()
        generate(network, repeated)
        theirs_s = min(theirs_s, time.process_time() - before)
    return {
        "engine_tokens_per_cpu_s": round(BATCH * NEW_TOKENS / ours_s),
        "transformers_tokens_per_cpu_s": round(BATCH * NEW_TOKENS / theirs_s),
        "ratio": round(theirs_s / ours_s, 2),
        "logprob_difference": difference,
    }


@contextmanager
def engine(network: Any, folder: Path) -> Iterator[tuple[str, int]]:
    """The engine's URL and its process."""
    network.save_pretrained(folder)
    port, log = processes.free_port("127.0.0.1"), folder / "engine.log"
    argv = [sys.executable, "-m", "r1mega.rollout.engine", "--model-path", str(folder)]
    argv += ["--port", str(port), "--max-running-requests", str(BATCH)]
    keeper = processes.start(argv, name="engine", log=log)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
    try:
        while not control.answers(f"{url}/health", timeout_s=5):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the engine did not answer:\n{processes.last_lines(log)}")
            time.sleep(0.1)
        children = Path(f"/proc/{keeper.pid}/task/{keeper.pid}/children").read_text()
        yield url, int(children)
    finally:
        processes.end([keeper], grace_s=5)


def ask(url: str, prompts: list[list[int]], samples: int) -> Any:
    """Answers of /generate, prompt by prompt; nothing is remembered of earlier calls."""
    control.post(f"{url}/flush_cache", {}, timeout_s=30)
    sampling = {"max_new_tokens": NEW_TOKENS, "ignore_eos": True, "n": samples}
    sampling["sampling_seed"] = 1
    body = {"input_ids": prompts, "sampling_params": sampling, "return_logprob": True}
    with urllib.request.urlopen(f"{url}/generate", json.dumps(body).encode(), 600) as answer:
        return json.load(answer)


def generate(network: Any, prompts: list[list[int]]) -> None:
    ids = torch.tensor(prompts)
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": True, "eos_token_id": None}
    network.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **settings)


def logprob_difference(network: Any, prompts: list[list[int]], answers: Any) -> float:
    """Between what was answered and transformers' forward over the same tokens: the largest of
    every response, and of those the second largest."""
    responses = torch.tensor([answer["output_ids"] for answer in answers])
    measured = torch.tensor(
        [[entry[0] for entry in a["meta_info"]["output_token_logprobs"]] for a in answers],
        dtype=torch.float64,
    )
    with torch.no_grad():
        logits = network(torch.cat([torch.tensor(prompts), responses], dim=1)).logits
    table = logits[:, -NEW_TOKENS - 1 : -1].double().log_softmax(-1)
    expected = table.gather(-1, responses[..., None]).squeeze(-1)
    return (measured - expected).abs().amax(dim=1).sort().values[-2].item()


def cpu_seconds(pid: int) -> float:
    """What all threads of a process have used."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) * 1e-9


if __name__ == "__main__":
    main()
