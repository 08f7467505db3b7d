"""What surrounds the weights in a Hugging Face folder: config.json, tokenizer, index of shards."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r1mega.model.hf_config import FP8_QUANTIZATION
from r1mega.weights import fp8
from r1mega.weights.slices import HF_INDEX, StoredTensor
from r1mega.weights.tensor_file import num_bytes

CONFIG = "config.json"
# Of descriptions, tokenizers, templates, code and licences; archives and other weights stay behind.
_COMPANIONS = {".json", ".model", ".tiktoken", ".jinja", ".txt", ".py", ".md", ""}
_TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


def read_companions(folder: Path) -> dict[str, bytes]:
    """What goes with the weights of ``folder`` wherever they go: the content of files by name."""
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.is_file()
        and path.suffix in _COMPANIONS
        and path.name != HF_INDEX
        and not path.name.startswith(".")  # .metadata makes a folder torch_dist's
    }


def matching_config(content: bytes, tensors: Mapping[str, StoredTensor]) -> bytes:
    """config.json with the dtype and the quantization that ``tensors`` have."""
    values: dict[str, Any] = json.loads(content)
    changed = dict(values)
    if any(stored.dtype == fp8.CODES for stored in tensors.values()):
        before = values.get("quantization_config") or {}
        changed["quantization_config"] = before | FP8_QUANTIZATION
    else:
        changed.pop("quantization_config", None)
    dtype = _TORCH_NAMES.get(tensors["model.norm.weight"].dtype)
    for key in {"torch_dtype", "dtype"} & values.keys() or {"torch_dtype"}:
        changed[key] = dtype
    return content if changed == values else (json.dumps(changed, indent=2) + "\n").encode()


def shard_index(tensors: Mapping[str, StoredTensor]) -> bytes:
    """The content of model.safetensors.index.json."""
    weight_map = {name: stored.pieces[0].file for name, stored in tensors.items()}
    total_size = sum(num_bytes(stored.dtype, stored.shape) for stored in tensors.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    return (json.dumps(index, indent=2) + "\n").encode()
