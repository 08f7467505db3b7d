"""Folders of random weights: Hugging Face's, and checkpoints under any layout, written by hand."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from r1mega.config import schema
from r1mega.model.hf_config import hf_config
from r1mega.parallel.layout import Layout
from r1mega.weights import fp8
from r1mega.weights.blocks import scale_name
from r1mega.weights.checkpoints.checkpoint import Progress, State, shard
from r1mega.weights.checkpoints.manifest import FileRecord, commit
from r1mega.weights.holders import balanced_owners, holders
from r1mega.weights.names import Spec, fp8_weights, hf_shapes
from r1mega.weights.regions import Region, whole
from r1mega.weights.slices import Piece, StoredTensor, checkpoint_index
from r1mega.weights.tensor_file import DTYPE_NAMES, TensorFile, digest_file, digest_tensor

_DENSE = {"vocab_size": 96, "num_hidden_layers": 2, "intermediate_size": 80}
V3 = schema.Model(
    vocab_size=96, num_hidden_layers=4, n_routed_experts=8, num_nextn_predict_layers=1
)
LLAMA = schema.Model(
    architecture="llama", num_attention_heads=8, num_key_value_heads=2, head_dim=8, **_DENSE
)
TIED = schema.Model(
    architecture="qwen2",
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    **_DENSE,
)


def random_weights(model: schema.Model, *, mtp: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """bf16, but for the expert bias."""
    g = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=g).to(
            torch.float32 if name.endswith("correction_bias") else torch.bfloat16
        )
        for name, shape in hf_shapes(model, Spec(mtp=mtp)).items()
    }


def quantized(weights: dict[str, Tensor], model: schema.Model) -> dict[str, Tensor]:
    """Those that DeepSeek-V3's FP8 checkpoints quantize, as codes and scales."""
    made = dict(weights)
    for name in fp8_weights(model, Spec(mtp=True)) & weights.keys():
        made[name], made[scale_name(name)] = fp8.quantize(weights[name].float())
    return made


def write_hf(folder: Path, model: schema.Model, weights: dict[str, Tensor], files: int = 2) -> Path:
    """A Hugging Face folder of ``files`` shards."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(hf_config(model)))
    names = {f"model-{i}.safetensors": list(weights)[i::files] for i in range(files)}
    for file, held in names.items():
        _write_tensors(folder / file, {name: weights[name] for name in held})
    weight_map = {name: file for file, held in names.items() for name in held}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_checkpoint(
    folder: Path, model: schema.Model, weights: dict[str, Tensor], layout: Layout
) -> Path:
    """A checkpoint of format 2, with weights only."""
    mtp = any(name.startswith(f"model.layers.{model.num_hidden_layers}.") for name in weights)
    partial = folder.with_name(f".{folder.name}.partial")
    (partial / "hf").mkdir(parents=True)
    (partial / "hf/config.json").write_text(json.dumps(hf_config(model)))
    index: dict[str, StoredTensor] = {}
    files: dict[str, dict[str, Tensor]] = {}
    for name, pieces in _owned(model, layout, Spec(mtp=mtp), weights):
        for file, region in pieces:
            files.setdefault(file, {})[name] = _cut(weights[name], region)
        index[name] = StoredTensor(
            tuple(weights[name].shape),
            tuple(
                Piece(file, name, region, digest_tensor(_cut(weights[name], region)))
                for file, region in pieces
            ),
            DTYPE_NAMES[weights[name].dtype],
        )
    for file, tensors in files.items():
        _write_tensors(partial / file, tensors)
    (partial / "index.json").write_text(checkpoint_index(index))
    state = State(
        progress=Progress(step=7, data_position=3),
        layout=layout,
        spec=Spec(mtp=mtp),
        model=model,
        code="0",
    )
    (partial / "state.json").write_text(state.text())
    names = [p.relative_to(partial) for p in partial.rglob("*") if p.is_file()]
    commit(partial, folder, {str(name): _record(partial / name) for name in names})
    return folder


def _owned(
    model: schema.Model, layout: Layout, spec: Spec, weights: dict[str, Tensor]
) -> Iterator[tuple[str, list[tuple[str, Region]]]]:
    table = holders(model, layout, spec)
    owners = balanced_owners(table, lambda name, region: weights[name][0].nbytes)
    for name, held in table.items():
        files = [shard("weights", rank) for rank in owners[name]]
        regions = [region for region, _ in held.parts]
        yield name, list(zip(files, regions, strict=True))


def _cut(values: Tensor, region: Region) -> Tensor:
    return values[tuple(slice(*span) for span in region)].contiguous()


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    described = {name: (DTYPE_NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
    with TensorFile.create(path, described) as file:
        for name, values in tensors.items():
            file.write(name, whole(values.shape), values)


def _record(path: Path) -> FileRecord:
    return FileRecord(path.stat().st_size, digest_file(path))
