"""Peak memory and time of the GRPO loss at a large vocabulary: this one, TRL's and Liger's.

From hidden states and output weight to the loss and both gradients, at 1,024 tokens, 512 channels
and 129,280 words, on one thread. Every measurement is a process of its own: inputs exist before,
the peak of its resident set over what they take is what counts, the gradients (265 MB of weight in
fp32) included; seconds are the CPU's. Candidates alternate; medians. All compute the same function,
which is asserted:

- r1mega: r1mega.parallel.logprobs.
- trl: hidden @ weight.T, selective_log_softmax, and entropy without gradient.
- trl_fused: the output head that TRL's GRPOTrainer puts on its models since 1.16.
- liger: LigerFusedLinearGRPOLoss, not compiled, no entropies. It averages over tokens, then over
  sequences; with sequences of one length that is the mean over all tokens, as for the others.

``fp32`` is each as it comes, ``fp32_onednn`` gives the others the products that r1mega asks for
itself (parallel.backend.onednn_products). r1mega computes four products where TRL's first path
computes three and keeps the logits: the fourth is what memory costs. Prints one JSON line.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median

os.environ |= {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "PYTHONWARNINGS": "ignore"}

import torch
from torch import Tensor

from r1mega.parallel.backend import onednn_products

SEQUENCES, TOKENS, HIDDEN, VOCABULARY = 8, 128, 512, 129_280
CHUNK_TOKENS = 256
BETA = 0.04  # weight of the KL term
REPEATS = 3
TOLERANCE = {"fp32": 1e-5, "fp32_onednn": 1e-5, "bf16": 1e-2}  # by setting


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    advantages: Tensor  # per sequence
    reference: Tensor  # log-probs of the targets


LossOf = Callable[[Inputs], Tensor]


def main() -> None:
    if sys.argv[1:]:
        print(json.dumps(measure(*sys.argv[1:])))
        return
    result: dict[str, object] = {"benchmark": "loss_memory"}
    for setting in TOLERANCE:
        result[setting] = compare(setting)
    print(json.dumps(result))


def compare(setting: str) -> dict[str, object]:
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in CANDIDATES}
    for _ in range(REPEATS):
        for name, rows in runs.items():
            rows.append(in_a_child(name, setting))
    medians = {
        name: {key: median(row[key] for row in rows) for key in rows[0]}
        for name, rows in runs.items()
    }
    ours = medians["r1mega"]
    for name, row in medians.items():
        for key in ("loss", "hidden_grad_norm", "weight_grad_norm"):
            if abs(row[key] - ours[key]) > TOLERANCE[setting] * abs(ours[key]):
                raise ValueError(f"{setting} {key}: {row[key]} of {name}, {ours[key]} of r1mega")
    return medians | {
        f"{key}_over_{name}": round(ours[key] / medians[name][key], 3)
        for key in ("peak_mb", "cpu_seconds")
        for name in medians
        if name != "r1mega"
    }


def in_a_child(name: str, setting: str) -> dict[str, float]:
    argv = [sys.executable, __file__, name, setting]
    child = subprocess.run(argv, check=True, stdout=subprocess.PIPE, timeout=900)
    return json.loads(child.stdout.splitlines()[-1])


def measure(name: str, setting: str) -> dict[str, float]:
    """Runs in a process of its own."""
    dtype = torch.bfloat16 if setting == "bf16" else torch.float32
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(SEQUENCES * TOKENS, HIDDEN, generator=g)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=g).mul_(0.05)
    hidden, weight = (x.to(dtype).requires_grad_() for x in (hidden, weight))
    inputs = Inputs(
        hidden=hidden,
        weight=weight,
        targets=torch.randint(0, VOCABULARY, (SEQUENCES * TOKENS,), generator=g),
        advantages=torch.randn(SEQUENCES, generator=g),
        reference=torch.randn(SEQUENCES * TOKENS, generator=g) - 12.0,
    )
    loss_of = CANDIDATES[name]()
    hidden.detach()[:8] @ weight.detach()[:8].T  # the library's own buffers
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident_mb("VmRSS")
    started = time.process_time()
    with onednn_products() if setting == "fp32_onednn" else nullcontext():
        loss = loss_of(inputs)
        loss.backward()
    seconds = time.process_time() - started
    return {
        "cpu_seconds": round(seconds, 2),
        "peak_mb": round(resident_mb("VmHWM") - before),
        "loss": loss.item(),
        "hidden_grad_norm": hidden.grad.float().norm().item(),
        "weight_grad_norm": weight.grad.float().norm().item(),
    }


def resident_mb(field: str) -> float:
    """VmRSS or VmHWM (the highest so far) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return int(kilobytes) / 1024


def r1mega() -> LossOf:
    import torch.distributed as dist

    from r1mega.parallel.logprobs import vocab_parallel_logprobs

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def loss_of(inputs: Inputs) -> Tensor:
        logprobs, _ = vocab_parallel_logprobs(
            inputs.hidden,
            inputs.weight,
            inputs.targets,
            temperature=1.0,
            chunk_tokens=CHUNK_TOKENS,
            group=dist.group.WORLD,
        )
        return grpo(logprobs, inputs)

    return loss_of


def trl() -> LossOf:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    def loss_of(inputs: Inputs) -> Tensor:
        logits = (inputs.hidden @ inputs.weight.T).view(SEQUENCES, TOKENS, VOCABULARY)
        logprobs, _ = selective_log_softmax_and_entropy(
            logits, inputs.targets.view(SEQUENCES, TOKENS), entropy_requires_grad=False
        )
        del logits  # as the trainer's does, they live on in autograd's graph alone
        return grpo(logprobs.flatten(), inputs)

    return loss_of


def trl_fused() -> LossOf:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as WIDTH

    def loss_of(inputs: Inputs) -> Tensor:
        logprobs, *_ = ChunkedLogProbFunction.apply(
            inputs.hidden, inputs.weight, None, inputs.targets, 1.0, WIDTH, None, 1.0, ("entropy",)
        )
        return grpo(logprobs, inputs)

    return loss_of


def liger() -> LossOf:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    fused = LigerFusedLinearGRPOLoss(beta=BETA, compiled=False, loss_type="grpo")

    def loss_of(inputs: Inputs) -> Tensor:
        loss, _ = fused(
            inputs.hidden.view(SEQUENCES, TOKENS, HIDDEN),
            inputs.weight,
            inputs.targets.view(SEQUENCES, TOKENS),
            torch.ones(SEQUENCES, TOKENS),
            inputs.advantages,
            ref_per_token_logps=inputs.reference.view(SEQUENCES, TOKENS),
        )
        return loss

    return loss_of


def grpo(logprobs: Tensor, inputs: Inputs) -> Tensor:
    """On the first update after sampling: the ratio is 1 and its gradient is not."""
    ratio = (logprobs - logprobs.detach()).exp()
    log_r = inputs.reference - logprobs
    kl = torch.expm1(log_r) - log_r
    return (BETA * kl - ratio * inputs.advantages.repeat_interleave(TOKENS)).mean()


CANDIDATES: dict[str, Callable[[], LossOf]] = {
    "r1mega": r1mega,
    "trl": trl,
    "trl_fused": trl_fused,
    "liger": liger,
}


if __name__ == "__main__":
    main()
