"""Run by SGLang's interpreter: its own models on some rank of an engine, filled by its own loaders.

Reads cases as JSON from a file: a model's folder, the arguments of a server, a rank, the shapes of
all Hugging Face tensors, and the slices that we think this rank has. Every element of every tensor
is another number, so what the loaders put where says what was cut how. Prints as JSON per case:
slices that the rank has elsewhere or in another dtype, and how many elements of which parameters
are in no slice. FP8 models are built, but their weights not loaded.

SGLang builds its layers before any process group exists; the groups that it asks for all the same
are stood in for by their size and rank.
"""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt import runtime_context
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.environ import envs
from sglang.srt.layers.dp_attention import initialize_dp_attention_flags
from sglang.srt.model_loader import loader
from sglang.srt.model_loader.utils import set_default_torch_dtype
from sglang.srt.server_args import ServerArgs


def main(path: str) -> None:
    print(json.dumps([differences(**case) for case in json.loads(Path(path).read_text())]))


def differences(
    folder: str,
    arguments: dict[str, Any],
    shared_replicated: bool,
    rank: int,
    shapes: dict[str, list[int]],
    slices: list[dict[str, Any]],
) -> dict[str, Any]:
    server = ServerArgs(
        model_path=folder,
        device="cpu",
        disable_shared_experts_fusion=True,
        load_format="dummy",
        **arguments,
    )
    ranks = runtime_context.SpawnRanks(world_rank=rank)
    context = runtime_context.create_context(server, role="scheduler", ranks=ranks)
    parallel = context.parallel
    with (
        envs.SGLANG_SHARED_EXPERT_TP1.override(shared_replicated),  # as all-to-all backends do
        runtime_context.use_context(context),
        parallel.override(
            **{
                f"{axis}_group": group(
                    getattr(parallel, f"{axis}_size"), getattr(parallel, f"{axis}_rank")
                )
                for axis in ("pp", "tp", "attn_tp", "moe_tp", "moe_ep")
            }
        ),
    ):
        initialize_dp_attention_flags(server)
        config, load = ModelConfig.from_server_args(server), LoadConfig()
        quantization = loader._get_quantization_config(config, load)
        with set_default_torch_dtype(config.dtype):
            model = loader._initialize_model(config, load, quantization)
        numbers = None
        if quantization is None:
            numbers = numbered(shapes)
            model.load_weights(iter(numbers.items()))
    weights = {  # not the scales of an FP8 KV cache, which no checkpoint of ours has
        name: parameter
        for name, parameter in model.named_parameters()
        if not name.endswith((".k_scale", ".v_scale"))
    }
    return compared(weights, numbers, slices, config.dtype)


def group(size: int, rank: int) -> SimpleNamespace:
    return SimpleNamespace(
        world_size=size,
        rank_in_group=rank,
        is_first_rank=rank == 0,
        is_last_rank=rank == size - 1,
        ranks=list(range(size)),
        device_group=None,
        cpu_group=None,
    )


def numbered(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Exact in fp32: there are fewer than 2^24 elements."""
    tensors, first = {}, 1.0
    for name, shape in shapes.items():
        tensors[name] = torch.arange(first, first + math.prod(shape)).reshape(shape)
        first += math.prod(shape)
    assert first < 2**24
    return tensors


def compared(
    parameters: dict[str, torch.Tensor],
    numbers: dict[str, torch.Tensor] | None,
    slices: list[dict[str, Any]],
    dtype: torch.dtype,
) -> dict[str, Any]:
    times = {name: torch.zeros(p.shape, dtype=torch.int8) for name, p in parameters.items()}
    wrong = []
    for piece in slices:
        name, region, parameter, target, own_dtype = piece.values()
        place = tuple(slice(*span) for span in target)
        there = parameters[parameter].data[place]
        times[parameter][place] += 1
        fits = list(there.shape) == [stop - start for start, stop in target]
        if fits and numbers is not None:
            values = numbers[name][tuple(slice(*span) for span in region)]
            fits = torch.equal(there.reshape(values.shape), values)
        if not fits or there.dtype != (getattr(torch, own_dtype) if own_dtype else dtype):
            wrong.append(f"{name}{region} at {parameter}{target}: {there.dtype} {there.shape}")
    return {
        "wrong": wrong,
        "twice": [name for name, count in times.items() if (count > 1).any()],
        "unfilled": {n: int((c == 0).sum()) for n, c in times.items() if (c == 0).any()},
    }


if __name__ == "__main__":
    main(sys.argv[1])
