"""One training step of the smoke's model: this learner against transformers, on the same batch.

Both do forward, backward, clipping and AdamW in fp32 on one thread. Prints one JSON line; the ratio
is what to look at, machines differ. Packing against padding is part of the difference.
"""

import json
import os
import time
from collections.abc import Callable
from statistics import median

os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
os.environ |= {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "PYTHONWARNINGS": "ignore"}

import torch

from r1mega.config import load
from r1mega.data.documents import load_documents
from r1mega.data.tokenizer import load_tokenizer
from r1mega.model.hf_config import hf_config
from r1mega.parallel.backend import open_backend
from r1mega.parallel.groups import open_groups
from r1mega.parallel.layout import Layout
from r1mega.system.processes import free_port

SEQUENCES = 128
REPEATS = 10


def main() -> None:
    os.environ["MASTER_PORT"] = str(free_port("127.0.0.1"))
    config = load(["configs/smoke/base.yaml", f"data.size={SEQUENCES}"])
    backend = open_backend("cpu")
    from r1mega.algorithms import sft
    from r1mega.learner.learner import open_learner

    documents = load_documents(config.data, load_tokenizer("arithmetic"), config.seed)
    groups = open_groups(Layout(world=1), backend, timeout_s=60, seed=1)
    learner = open_learner(
        config.model, config.learner, groups, backend, temperature=1.0, seed=config.seed
    )
    tokens = sum(len(document.token_ids) for document in documents)
    ours = tokens / seconds(lambda: sft.step(documents, learner=learner, lr=1e-4))
    theirs = tokens / seconds(transformers_step(config.model, documents))
    print(
        json.dumps(
            {
                "benchmark": "learner_step",
                "tokens": tokens,
                "r1mega_tokens_per_s": round(ours),
                "transformers_tokens_per_s": round(theirs),
                "ratio": round(ours / theirs, 2),
            }
        )
    )


def transformers_step(model, documents) -> Callable[[], None]:  # type: ignore[no-untyped-def]
    """The same step on a padded batch."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    network = DeepseekV3ForCausalLM(DeepseekV3Config(**hf_config(model, dtype="float32")))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    width = max(len(document.token_ids) for document in documents)
    ids = torch.zeros(len(documents), width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, document in enumerate(documents):
        ids[row, : len(document.token_ids)] = torch.tensor(document.token_ids)
        labels[row, : len(document.token_ids)] = torch.tensor(document.token_ids)

    def step() -> None:
        optimizer.zero_grad()
        network(input_ids=ids, labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

    return step


def seconds(step: Callable[[], object]) -> float:
    """Median of several runs after one to warm up."""
    step()
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return median(times)


if __name__ == "__main__":
    main()
