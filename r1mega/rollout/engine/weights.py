"""The engine's parameters: fused storage for speed, seen from outside by Hugging Face's names.

``Weights.named`` maps every HF name to a *view* of the fused storage, so loading a tensor is one
copy and nothing is derived afterwards. All storage is float32: payloads of another dtype are cast
on load, and checksums are of the float32 values.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from r1mega.config import network
from r1mega.config.schema import Model
from r1mega.rollout.checksum import cpu_checksum
from r1mega.weights.blocks import weight_name
from r1mega.weights.names import hf_shapes
from r1mega.weights.regions import whole
from r1mega.weights.slices import SliceReader

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
class MlaWeights:
    down_proj: Tensor  # what reads the hidden state: q (or its LoRA), kv latent, rotary key
    q_norm: Tensor | None
    q_up_proj: Tensor | None
    kv_norm: Tensor
    kv_up_proj: Tensor
    out_proj: Tensor


@dataclass(frozen=True, slots=True)
class GqaWeights:
    qkv: Tensor  # query, key, value heads
    qkv_bias: Tensor | None
    out_proj: Tensor
    out_bias: Tensor | None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    input_norm: Tensor
    attention: MlaWeights | GqaWeights
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
    store = _Store(hf_shapes(model))
    embedding = store.own("model.embed_tokens.weight")
    layers = tuple(_layer(store, model, index) for index in range(model.num_hidden_layers))
    norm = store.own("model.norm.weight")
    head = embedding if model.tie_word_embeddings else store.own("lm_head.weight")
    return Weights(embedding=embedding, layers=layers, norm=norm, head=head, named=store.named)


@dataclass(frozen=True, slots=True)
class _Store:
    """Allocates tensors in the shapes of Hugging Face's names, and keeps who is where."""

    shapes: Mapping[str, tuple[int, ...]]
    named: dict[str, Tensor] = field(default_factory=dict)

    def own(self, name: str) -> Tensor:
        self.named[name] = torch.empty(self.shapes[name], dtype=torch.float32)
        return self.named[name]

    def stack(self, *names: str) -> Tensor:
        """One tensor whose row blocks are the named tensors."""
        rows = [self.shapes[name][0] for name in names]
        fused = torch.empty(sum(rows), *self.shapes[names[0]][1:], dtype=torch.float32)
        self.named.update(zip(names, fused.split(rows), strict=True))
        return fused

    def mlp(self, prefix: str) -> MlpWeights:
        names = (f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight")
        return MlpWeights(gate_up=self.stack(*names), down=self.own(f"{prefix}.down_proj.weight"))

    def experts(self, prefix: str, count: int) -> MlpWeights:
        """The MLPs of all experts, stacked in front; ``down`` lies as one matrix (hidden, rest)."""
        width, hidden = self.shapes[f"{prefix}.0.gate_proj.weight"]
        gate_up = torch.empty(count, 2 * width, hidden, dtype=torch.float32)
        down = torch.empty(hidden, count, width, dtype=torch.float32).transpose(0, 1)
        for expert in range(count):
            self.named[f"{prefix}.{expert}.gate_proj.weight"] = gate_up[expert, :width]
            self.named[f"{prefix}.{expert}.up_proj.weight"] = gate_up[expert, width:]
            self.named[f"{prefix}.{expert}.down_proj.weight"] = down[expert]
        return MlpWeights(gate_up=gate_up, down=down)


def _layer(store: _Store, model: Model, index: int) -> LayerWeights:
    layer = f"model.layers.{index}"
    attention = _gqa if network.is_dense(model) else _mla
    return LayerWeights(
        input_norm=store.own(f"{layer}.input_layernorm.weight"),
        attention=attention(store, f"{layer}.self_attn"),
        mlp_norm=store.own(f"{layer}.post_attention_layernorm.weight"),
        mlp=store.mlp(f"{layer}.mlp")
        if index < network.num_dense_layers(model)
        else _moe(store, f"{layer}.mlp", model.n_routed_experts),
    )


def _mla(store: _Store, prefix: str) -> MlaWeights:
    has_lora = f"{prefix}.q_a_proj.weight" in store.shapes
    query = "q_a_proj" if has_lora else "q_proj"
    return MlaWeights(
        down_proj=store.stack(f"{prefix}.{query}.weight", f"{prefix}.kv_a_proj_with_mqa.weight"),
        q_norm=store.own(f"{prefix}.q_a_layernorm.weight") if has_lora else None,
        q_up_proj=store.own(f"{prefix}.q_b_proj.weight") if has_lora else None,
        kv_norm=store.own(f"{prefix}.kv_a_layernorm.weight"),
        kv_up_proj=store.own(f"{prefix}.kv_b_proj.weight"),
        out_proj=store.own(f"{prefix}.o_proj.weight"),
    )


def _gqa(store: _Store, prefix: str) -> GqaWeights:
    names = [f"{prefix}.{name}_proj" for name in "qkv"]
    biases = [f"{name}.bias" for name in names]
    out = f"{prefix}.o_proj"
    return GqaWeights(
        qkv=store.stack(*(f"{name}.weight" for name in names)),
        qkv_bias=store.stack(*biases) if biases[0] in store.shapes else None,
        out_proj=store.own(f"{out}.weight"),
        out_bias=store.own(f"{out}.bias") if f"{out}.bias" in store.shapes else None,
    )


def _moe(store: _Store, prefix: str, num_experts: int) -> MoeWeights:
    return MoeWeights(
        router=store.own(f"{prefix}.gate.weight"),
        router_bias=store.own(f"{prefix}.gate.e_score_correction_bias"),
        experts=store.experts(f"{prefix}.experts", num_experts),
        shared=store.mlp(f"{prefix}.shared_experts"),
    )


def fill_random(weights: Weights, seed: int) -> None:
    """Normal matrices, norms one, biases zero: the same values for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in weights.named.items():
        if name.endswith("bias"):
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
    with SliceReader(folder) as reader:
        stored = {n: t for n, t in reader.tensors.items() if not _is_unused(n, weights)}
        missing = sorted(weights.named.keys() - stored.keys())
        if missing:
            raise ValueError(f"{folder} lacks {len(missing)} parameters, the first is {missing[0]}")
        check_names(weights, stored, (tensor.shape for tensor in stored.values()))
        load(weights, ((n, reader.read(n, t.shape, whole(t.shape))) for n, t in stored.items()))


def _is_unused(name: str, weights: Weights) -> bool:
    """MTP layers, rotary tables and a tied head may lie in a checkpoint; they are not served.
    Scales are read with their weights."""
    if weight_name(name) is not None:
        return True
    if name == "lm_head.weight" and name not in weights.named:
        return True
    parts = name.split(".")
    beyond = parts[:2] == ["model", "layers"] and int(parts[2]) >= len(weights.layers)
    return beyond or name.endswith("rotary_emb.inv_freq")


def checksums(weights: Weights, skip: Iterable[str] = ()) -> Iterator[tuple[str, str]]:
    """(HF name, checksum) of every parameter whose name contains none of ``skip``."""
    skipped = tuple(skip)
    for name, tensor in weights.named.items():
        if not any(part in name for part in skipped):
            yield name, cpu_checksum(tensor)
