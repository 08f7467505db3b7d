"""A whole GRPO step, sampling to update: this project's against TRL's GRPOTrainer, on CPU.

Both start from the same dense Qwen2 weights (a million parameters, random) and run the same steps:
16 arithmetic prompts, 8 samples of up to 64 tokens each, rewards for answer and format, reference
log-probs, one update. The loss is DeepSeek-R1's: mean over a sample's tokens, then over samples
(TRL: ``loss_type="grpo"``), clipped at 0.2 and 0.28, k3 at 0.001, one update per rollout; AdamW
with the same settings. A tiny learning rate keeps response lengths alike. What TRL cannot be told:
it divides advantages by the sample standard deviation plus 1e-4, R1 by the population's.

Either side may use two cores: TRL one process with one thread or two, whichever is faster; here two
learner ranks and two engines of one thread each, which take turns. Ours is ``r1mega rl`` itself,
timed by its metrics and by the CPU time of all its processes. Both also compute loss and gradient
norm of the same samples, whose policy differs from the reference, and have to agree. (Of what they
differ by, nearly all is TRL's: in float64 the gradient norm is ours to 1e-6.)

The floor is the time of the step's matrix products alone, each measured at its own shape on one
core: prompts once per group, every response token once, reference forward, policy forward and
backward; attention scores, a hundredth of that, are left out. Prints one JSON line.
"""

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "PYTHONWARNINGS": "ignore"}

import psutil
import torch

from r1mega.config import Config, load
from r1mega.data.prompts import load_prompts
from r1mega.data.tokenizer import load_tokenizer, save_tokenizer
from r1mega.model.hf_config import hf_config
from r1mega.records import Prompt, Sequence

LAYER = Path(__file__).with_suffix(".yaml")
WARMUP, STEPS, ROUNDS = 3, 10, 2
DEADLINE_S = 1200.0


def main() -> None:
    if sys.argv[1:]:
        side, folder, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
        print(json.dumps(trl_side(folder, threads) if side == "trl" else our_gradient(folder)))
        return
    config = load([str(LAYER)])
    with TemporaryDirectory() as name:
        folder = Path(name)
        num_parameters = write_models(config, folder)
        runs = [(our_run(folder, number), trl_run(folder)) for number in range(ROUNDS)]
        gradient = in_a_child("ours", folder, threads=1)
    ours, trl = (merge(list(side)) for side in zip(*runs, strict=True))
    same = {name: (gradient[name], trl.pop(name)) for name in ("loss", "grad_norm")}
    for name, (mine, theirs) in same.items():
        if abs(mine - theirs) > 1e-4 * abs(theirs):
            raise ValueError(f"on the same samples the {name} is {mine} here and {theirs} in TRL")
    floor = floor_of(config, ours["response_tokens"])
    print(
        json.dumps(
            {
                "benchmark": "grpo_step",
                "parameters": num_parameters,
                "samples": num_samples(config),
                "ratio": round(trl["step_s"] / ours["step_s"], 2),
                "cpu_ratio": round(trl["step_cpu_s"] / ours["step_cpu_s"], 2),
                "r1mega": ours,
                "trl": trl,
                "floor": floor,
                "same_samples": same,
            }
        )
    )


def num_samples(config: Config) -> int:
    return config.algorithm.prompts_per_step * config.algorithm.group_size


def merge(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(median(run[name] for run in runs), 9) for name in runs[0]}


def trl_run(folder: Path) -> dict[str, float]:
    runs = [in_a_child("trl", folder, threads=threads) for threads in (1, 2)]
    return min(runs, key=lambda run: run["step_s"])


def in_a_child(side: str, folder: Path, *, threads: int) -> dict[str, float]:
    argv = [sys.executable, __file__, side, str(folder), str(threads)]
    child = subprocess.run(argv, check=True, stdout=subprocess.PIPE, timeout=DEADLINE_S)
    return json.loads(child.stdout.splitlines()[-1])


def write_models(config: Config, folder: Path) -> int:
    """The base model, and a policy that has moved away from it."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(config.seed)
    network = Qwen2ForCausalLM(Qwen2Config(**hf_config(config.model, dtype="float32")))
    for name in ("base", "moved"):
        network.save_pretrained(folder / name)
        save_tokenizer(config.model.tokenizer, folder / name)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
    return sum(parameter.numel() for parameter in network.parameters())


def prompts_of(config: Config) -> list[Prompt]:
    return load_prompts(config.data, load_tokenizer(config.model.tokenizer), config.seed).train


def fixed_samples(config: Config) -> list[Sequence]:
    """Random responses of random lengths with random advantages: the same in every process."""
    rng = random.Random(config.seed)
    sequences = []
    for prompt in prompts_of(config)[: num_samples(config)]:
        length = rng.randint(1, config.rollout.max_response_tokens)
        response = tuple(rng.randrange(3, config.model.vocab_size) for _ in range(length))
        sequences.append(
            Sequence(
                uid=prompt.uid,
                token_ids=prompt.token_ids + response,
                start=len(prompt.token_ids),
                weight=1 / (num_samples(config) * length),
                advantage=rng.gauss(0.0, 1.0),
                sampler_logprobs=(0.0,) * length,  # only compared with, for the metrics
            )
        )
    return sequences


def our_run(folder: Path, number: int) -> dict[str, float]:
    """``r1mega rl`` in a process of its own; medians over its steady steps."""
    name = f"round_{number}"
    argv = [sys.executable, "-m", "r1mega", "rl", str(LAYER), f"name={name}"]
    argv += [f"model.init={folder / 'base'}", f"run.root={folder / 'runs'}"]
    argv += [f"stage.steps={WARMUP + STEPS}"]
    log = folder / f"{name}.log"
    with log.open("wb") as out:
        job = subprocess.Popen(argv, stdout=out, stderr=out)
    metrics = folder / "runs" / name / "metrics.jsonl"
    try:
        before = cpu_seconds_at(job, metrics, WARMUP, log)
        after = cpu_seconds_at(job, metrics, WARMUP + STEPS - 1, log)
        job.wait(timeout=DEADLINE_S)
    finally:
        job.terminate()
        job.wait()
    rows = [json.loads(line) for line in metrics.read_text().splitlines()][WARMUP:]
    config = load([str(LAYER)])
    phases = ("time/rollout_s", "time/reward_s", "time/logprobs_s", "time/update_s", "time/sync_s")
    step_s = median(row["time/step_s"] for row in rows)
    return {
        "samples_per_s": num_samples(config) / step_s,
        "step_s": step_s,
        "step_cpu_s": (after - before) / (STEPS - 1),
        "response_tokens": median(row["response/length_mean"] for row in rows),
        **{name: median(row[name] for row in rows) for name in phases},
    }


def cpu_seconds_at(job: subprocess.Popen[bytes], metrics: Path, step: int, log: Path) -> float:
    """CPU time of the job and all it started, at the moment it has recorded ``step``."""
    deadline = time.monotonic() + DEADLINE_S
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < step:
        if job.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"r1mega rl did not reach step {step}:\n{log.read_text()[-4000:]}")
        time.sleep(0.01)
    root = psutil.Process(job.pid)
    times = [process.cpu_times() for process in (root, *root.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def our_gradient(folder: Path) -> dict[str, float]:
    """Loss and gradient norm of the fixed samples, in this process."""
    from r1mega.parallel.backend import open_backend
    from r1mega.parallel.groups import open_groups
    from r1mega.parallel.layout import Layout
    from r1mega.system.processes import free_port

    rank = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= rank | {"MASTER_PORT": str(free_port("127.0.0.1"))}
    backend = open_backend("cpu")
    from dataclasses import replace

    from r1mega.algorithms.losses import ClippedSurrogate
    from r1mega.learner.learner import open_learner
    from r1mega.records import Batch
    from r1mega.weights.local import initialize

    config = load([str(LAYER), f"model.init={folder / 'base'}"])
    algorithm = config.algorithm
    groups = open_groups(Layout(world=1), backend, timeout_s=60, seed=1)
    learner = open_learner(
        config.model, config.learner, groups, backend, temperature=1.0, seed=config.seed
    )
    batch = Batch(tuple(fixed_samples(config)))
    reference = learner.logprobs(batch)
    initialize(learner.weights, str(folder / "moved"), seed=config.seed)
    rows = zip(batch.sequences, reference, strict=True)
    batch = Batch(tuple(replace(s, reference_logprobs=row) for s, row in rows))
    loss = ClippedSurrogate(
        clip_low=algorithm.clip_low, clip_high=algorithm.clip_high, kl_coef=algorithm.kl_coef
    )
    metrics = learner.update(batch, loss, lr=0.0)
    return {"loss": metrics["loss"], "grad_norm": metrics["learner/grad_norm"]}


def trl_side(folder: Path, threads: int) -> dict[str, float]:
    """TRL in this process: the fixed samples, then its training loop."""
    from transformers import TrainerCallback

    torch.set_num_threads(threads)
    config = load([str(LAYER)])
    marks: list[tuple[float, float]] = []

    class Marks(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append((time.perf_counter(), time.process_time()))

    trainer = trl_trainer(config, folder / "base", folder / "trl")
    gradient = trl_gradient(config, trainer, folder / "moved")
    trainer = trl_trainer(config, folder / "base", folder / "trl")
    trainer.add_callback(Marks())
    trainer.train()
    steady = marks[WARMUP - 1 :]
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(steady)]
    lengths = [row["completions/mean_length"] for row in trainer.state.log_history[WARMUP:-1]]
    step_s = median(wall for wall, _ in steps)
    return gradient | {
        "threads": float(threads),
        "samples_per_s": num_samples(config) / step_s,
        "step_s": step_s,
        "step_cpu_s": (steady[-1][1] - steady[0][1]) / len(steps),
        "response_tokens": median(lengths),
    }


def trl_trainer(config: Config, model: Path, output: Path) -> Any:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    algorithm, learner = config.algorithm, config.learner
    settings = GRPOConfig(
        output_dir=str(output),
        max_steps=WARMUP + STEPS,
        per_device_train_batch_size=num_samples(config),
        num_generations=algorithm.group_size,
        max_completion_length=config.rollout.max_response_tokens,
        temperature=config.rollout.temperature,
        loss_type="grpo",
        epsilon=algorithm.clip_low,
        epsilon_high=algorithm.clip_high,
        beta=algorithm.kl_coef,
        num_iterations=1,
        learning_rate=learner.lr,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        adam_beta1=learner.adam_beta1,
        adam_beta2=learner.adam_beta2,
        adam_epsilon=learner.adam_eps,
        weight_decay=learner.weight_decay,
        max_grad_norm=learner.clip_grad,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=config.seed,
    )
    rows = [{"prompt": prompt.text, "gold": prompt.answer} for prompt in prompts_of(config)]
    return GRPOTrainer(
        model=str(model),
        reward_funcs=[accuracy, form],
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(
            model, padding_side="left", pad_token="<pad>"
        ),
    )


def accuracy(completions: list[str], gold: list[str], **_: Any) -> list[float]:
    """Equal text only, where r1mega also asks math-verify."""
    from r1mega.rewards.answer import extract_answer

    pairs = zip(completions, gold, strict=True)
    return [float(extract_answer(completion) == answer) for completion, answer in pairs]


def form(completions: list[str], **_: Any) -> list[float]:
    from r1mega.rewards.format import follows_format

    return [float(follows_format(completion)) for completion in completions]


def trl_gradient(config: Config, trainer: Any, moved: Path) -> dict[str, float]:
    """TRL's own loss of the fixed samples, with the reference it loaded and a policy moved away."""
    from torch.nn.utils.rnn import pad_sequence
    from transformers import Qwen2ForCausalLM

    samples = fixed_samples(config)
    prompts = [torch.tensor(s.token_ids[: s.start]) for s in samples]
    responses = [torch.tensor(s.token_ids[s.start :]) for s in samples]
    inputs = {
        "prompt_ids": pad_sequence(prompts, batch_first=True, padding_side="left"),
        "prompt_mask": pad_sequence(
            [torch.ones_like(p) for p in prompts], batch_first=True, padding_side="left"
        ),
        "completion_ids": pad_sequence(responses, batch_first=True),
        "completion_mask": pad_sequence([torch.ones_like(r) for r in responses], batch_first=True),
        "advantages": torch.tensor([s.advantage for s in samples]),
    }
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    with torch.no_grad():
        inputs["ref_per_token_logps"], *_ = trainer._get_per_token_logps_and_entropies(
            trainer.ref_model, ids, mask, inputs["completion_ids"].shape[1]
        )
    policy = trainer.model.train()
    policy.load_state_dict(Qwen2ForCausalLM.from_pretrained(moved).state_dict())
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(policy, inputs)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in policy.parameters()])
    return {"loss": loss.item(), "grad_norm": norm.item()}


def floor_of(config: Config, response_tokens: float) -> dict[str, float]:
    """Seconds on one core of the products alone, and their number of operations."""
    torch.set_num_threads(1)
    prompt = sum(len(p.token_ids) for p in prompts_of(config)) / config.data.size
    responses = num_samples(config) * response_tokens
    sampled = responses + config.algorithm.prompts_per_step * prompt
    trained = responses + num_samples(config) * prompt
    shapes = products(config)
    sampling = [(config.rollout.max_running_requests, k, n, sampled, 1) for k, n in shapes]
    training = [(config.learner.tokens_per_microbatch, k, n, trained, 4) for k, n in shapes]
    work = sampling + training
    return {
        "gflop": round(sum(2e-9 * k * n * tokens * times for _, k, n, tokens, times in work), 1),
        "sampling_cpu_s": round(sum(product_seconds(*each) for each in sampling), 3),
        "training_cpu_s": round(sum(product_seconds(*each) for each in training), 3),
    }


def products(config: Config) -> list[tuple[int, int]]:
    """Inputs and outputs of every matrix that a token goes through."""
    values = asdict(config.model)
    hidden, inner, heads = (
        values[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")
    )
    both = hidden + 2 * hidden * values["num_key_value_heads"] // heads
    layer = [(hidden, both), (hidden, hidden), (hidden, 2 * inner), (inner, hidden)]
    return layer * values["num_hidden_layers"] + [(hidden, values["vocab_size"])]


def product_seconds(rows: int, inputs: int, outputs: int, tokens: float, times: int) -> float:
    """``tokens`` rows through one matrix ``times`` times, ``rows`` at a time; the best of several.

    A backward pass is two such products.
    """
    left, right = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    best = min(timed(lambda: left @ right.T) for _ in range(20))
    return best * tokens / rows * times


def timed(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
