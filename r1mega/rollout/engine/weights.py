"""The engine's parameters: fused storage for speed, seen from outside by Hugging Face's names.

``Weights.named`` maps every HF name to a *view* of the fused storage, so loading a tensor is one
copy and nothing is derived afterwards. All storage is float32: payloads of another dtype are cast
on load, and checksums are of the float32 values.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from r1mega.config.schema import Model
from r1mega.rollout.wire import digest

_INIT_STD = 0.02


@dataclass(frozen=True, slots=True)
class MlpWeights:
    gate_up: Tensor  # (..., 2 * width, hidden): gate first
    down: Tensor  # (..., hidden, width)


@dataclass(frozen=True, slots=True)
class MoeWeights:
    router: Tensor
    router_bias: Tensor  # e_score_correction_bias: moves the choice, not the weight of an expert
    experts: MlpWeights  # stacked over experts in front
    shared: MlpWeights


@dataclass(frozen=True, slots=True)
class LayerWeights:
    input_norm: Tensor
    down_proj: Tensor  # what reads the hidden state: q (or its LoRA), kv latent, rotary key
    q_norm: Tensor | None
    q_up_proj: Tensor | None
    kv_norm: Tensor
    kv_up_proj: Tensor
    out_proj: Tensor
    mlp_norm: Tensor
    mlp: MlpWeights | MoeWeights


@dataclass(frozen=True, slots=True)
class Weights:
    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Tensor
    named: Mapping[str, Tensor]


def allocate(model: Model) -> Weights:
    """Uninitialised weights of this network."""
    named: dict[str, Tensor] = {}
    hidden = model.hidden_size
    embedding = _own(named, "model.embed_tokens.weight", model.vocab_size, hidden)
    layers = tuple(_layer(named, model, index) for index in range(model.num_hidden_layers))
    norm = _own(named, "model.norm.weight", hidden)
    head = embedding
    if not model.tie_word_embeddings:
        head = _own(named, "lm_head.weight", model.vocab_size, hidden)
    return Weights(embedding=embedding, layers=layers, norm=norm, head=head, named=named)


def _own(named: dict[str, Tensor], name: str, *shape: int) -> Tensor:
    named[name] = torch.empty(shape, dtype=torch.float32)
    return named[name]


def _stack(named: dict[str, Tensor], rows: Mapping[str, int], columns: int) -> Tensor:
    """One matrix whose row blocks are the named matrices."""
    fused = torch.empty(sum(rows.values()), columns, dtype=torch.float32)
    named.update(zip(rows, fused.split(list(rows.values())), strict=True))
    return fused


def _layer(named: dict[str, Tensor], model: Model, index: int) -> LayerWeights:
    prefix = f"model.layers.{index}"
    attention = f"{prefix}.self_attn"
    hidden, heads = model.hidden_size, model.num_attention_heads
    q_rows = heads * (model.qk_nope_head_dim + model.qk_rope_head_dim)
    latent_rows = model.kv_lora_rank + model.qk_rope_head_dim
    q_rank = model.q_lora_rank
    q_name = f"{attention}.q_proj.weight" if q_rank is None else f"{attention}.q_a_proj.weight"
    down_rows = {
        q_name: q_rows if q_rank is None else q_rank,
        f"{attention}.kv_a_proj_with_mqa.weight": latent_rows,
    }
    dense = index < model.first_k_dense_replace
    return LayerWeights(
        input_norm=_own(named, f"{prefix}.input_layernorm.weight", hidden),
        down_proj=_stack(named, down_rows, hidden),
        q_norm=None if q_rank is None else _own(named, f"{attention}.q_a_layernorm.weight", q_rank),
        q_up_proj=None
        if q_rank is None
        else _own(named, f"{attention}.q_b_proj.weight", q_rows, q_rank),
        kv_norm=_own(named, f"{attention}.kv_a_layernorm.weight", model.kv_lora_rank),
        kv_up_proj=_own(
            named,
            f"{attention}.kv_b_proj.weight",
            heads * (model.qk_nope_head_dim + model.v_head_dim),
            model.kv_lora_rank,
        ),
        out_proj=_own(named, f"{attention}.o_proj.weight", hidden, heads * model.v_head_dim),
        mlp_norm=_own(named, f"{prefix}.post_attention_layernorm.weight", hidden),
        mlp=_mlp(named, f"{prefix}.mlp", hidden, model.intermediate_size)
        if dense
        else _moe(named, f"{prefix}.mlp", model),
    )


def _mlp(named: dict[str, Tensor], prefix: str, hidden: int, width: int) -> MlpWeights:
    gate_up = {f"{prefix}.gate_proj.weight": width, f"{prefix}.up_proj.weight": width}
    return MlpWeights(
        gate_up=_stack(named, gate_up, hidden),
        down=_own(named, f"{prefix}.down_proj.weight", hidden, width),
    )


def _moe(named: dict[str, Tensor], prefix: str, model: Model) -> MoeWeights:
    hidden, width, count = model.hidden_size, model.moe_intermediate_size, model.n_routed_experts
    router = _own(named, f"{prefix}.gate.weight", count, hidden)
    router_bias = _own(named, f"{prefix}.gate.e_score_correction_bias", count)
    gate_up = torch.empty(count, 2 * width, hidden, dtype=torch.float32)
    down = torch.empty(count, hidden, width, dtype=torch.float32)
    for expert in range(count):
        named[f"{prefix}.experts.{expert}.gate_proj.weight"] = gate_up[expert, :width]
        named[f"{prefix}.experts.{expert}.up_proj.weight"] = gate_up[expert, width:]
        named[f"{prefix}.experts.{expert}.down_proj.weight"] = down[expert]
    shared = _mlp(named, f"{prefix}.shared_experts", hidden, width * model.n_shared_experts)
    return MoeWeights(
        router=router,
        router_bias=router_bias,
        experts=MlpWeights(gate_up=gate_up, down=down),
        shared=shared,
    )


def fill_random(weights: Weights, seed: int) -> None:
    """Normal matrices, norms one, expert bias zero: the same values for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in weights.named.items():
        if name.endswith("e_score_correction_bias"):
            tensor.zero_()
        elif tensor.dim() == 1:
            tensor.fill_(1.0)
        else:
            tensor.normal_(0.0, _INIT_STD, generator=generator)


def check_names(weights: Weights, names: Iterable[str], shapes: Iterable[Iterable[int]]) -> None:
    """Raises ValueError at the first tensor that this network does not have in this shape."""
    for name, shape in zip(names, shapes, strict=True):
        own = weights.named.get(name)
        if own is None:
            raise ValueError(f"there is no parameter {name!r} in this model")
        if tuple(own.shape) != tuple(shape):
            raise ValueError(
                f"parameter {name!r} has shape {list(own.shape)} here, the update has {list(shape)}"
            )


def load(weights: Weights, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copy checked tensors in."""
    for name, tensor in tensors:
        weights.named[name].copy_(tensor)


def load_folder(weights: Weights, folder: Path) -> None:
    """Load every parameter from a Hugging Face folder; nothing is written unless all of it fits."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no *.safetensors: give a Hugging Face model folder")
    with ExitStack() as stack:
        handles = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        owner = {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118
        wanted = {name: owner[name] for name in owner if not _is_unused(name, weights)}
        missing = sorted(weights.named.keys() - wanted.keys())
        if missing:
            raise ValueError(f"{folder} lacks {len(missing)} parameters, the first is {missing[0]}")
        shapes = [handle.get_slice(name).get_shape() for name, handle in wanted.items()]
        check_names(weights, wanted, shapes)
        load(weights, ((name, handle.get_tensor(name)) for name, handle in wanted.items()))


def _is_unused(name: str, weights: Weights) -> bool:
    """MTP layers, rotary tables and a tied head may lie in a checkpoint; they are not served."""
    if name == "lm_head.weight" and name not in weights.named:
        return True
    parts = name.split(".")
    beyond = parts[:2] == ["model", "layers"] and int(parts[2]) >= len(weights.layers)
    return beyond or name.endswith("rotary_emb.inv_freq")


def checksums(weights: Weights, skip: Iterable[str] = ()) -> Iterator[tuple[str, str]]:
    """(HF name, digest) of every parameter whose name contains none of ``skip``."""
    skipped = tuple(skip)
    for name, tensor in weights.named.items():
        if not any(part in name for part in skipped):
            yield name, digest(tensor)
