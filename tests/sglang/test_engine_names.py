"""The engine column of the table against SGLang's own models and loaders, rank by rank."""

import json
import os
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from r1mega.config import schema
from r1mega.data.tokenizer import save_tokenizer
from r1mega.model.hf_config import hf_config
from r1mega.weights.engine_names import EngineLayout, engine_slices
from r1mega.weights.names import hf_shapes
from tests.sglang.servers import PLUGIN, PYTHON

SMALL = {"num_hidden_layers": 2, "vocab_size": 160}
V3 = schema.Model(**SMALL)
FULL_Q = schema.Model(**SMALL, q_lora_rank=None, n_shared_experts=2)
LLAMA = schema.Model(architecture="llama", num_key_value_heads=2, attention_bias=True, **SMALL)
QWEN2 = schema.Model(architecture="qwen2", num_key_value_heads=2, tie_word_embeddings=True, **SMALL)
WIDE = schema.Model(
    **SMALL,
    hidden_size=256,
    intermediate_size=512,
    moe_intermediate_size=256,
    num_attention_heads=2,
    q_lora_rank=128,
    kv_lora_rank=120,
    qk_nope_head_dim=128,
    qk_rope_head_dim=128,
    v_head_dim=128,
)
FP8 = {
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
}
CASES = {
    "v3": (V3, EngineLayout()),
    "v3 tp4": (V3, EngineLayout(tp=4)),
    "v3 tp4 ep2": (V3, EngineLayout(tp=4, ep=2)),
    "v3 tp4 ep4 dp2": (V3, EngineLayout(tp=4, ep=4, dp=2)),
    "v3 all flags": (
        V3,
        EngineLayout(tp=4, ep=2, dp=4, dense_replicated=True, shared_replicated=True, dp_head=True),
    ),
    "v3 without q-LoRA tp2": (FULL_Q, EngineLayout(tp=2, ep=2)),
    "llama tp4": (LLAMA, EngineLayout(tp=4)),
    "qwen2 tp4": (QWEN2, EngineLayout(tp=4)),
    "fp8 tp2": (WIDE, EngineLayout(tp=2, quantized=True)),
    "fp8 tp2 ep2 dp2": (WIDE, EngineLayout(tp=2, ep=2, dp=2, quantized=True)),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What was found on every rank of every case, of one process."""
    folder = tmp_path_factory.mktemp("engine_names")
    cases = [
        case_of(folder / name.replace(" ", "-"), model, layout, rank)
        for name, (model, layout) in CASES.items()
        for rank in range(layout.tp)
    ]
    path = folder / "cases.json"
    path.write_text(json.dumps(cases))
    found = subprocess.run(
        [PYTHON, Path(__file__).with_name("fill_ranks.py"), path],
        env={**os.environ, "PYTHONPATH": str(PLUGIN), "SGLANG_USE_CPU_ENGINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    answers = iter(json.loads(found.stdout.splitlines()[-1]))
    return {name: [next(answers) for _ in range(layout.tp)] for name, (_, layout) in CASES.items()}


def case_of(folder: Path, model: schema.Model, layout: EngineLayout, rank: int) -> dict[str, Any]:
    save_tokenizer(model.tokenizer, folder)
    config = hf_config(model) | (FP8 if layout.quantized else {})
    (folder / "config.json").write_text(json.dumps(config))
    fields = ("hf_name", "region", "parameter", "target", "dtype")
    return {
        "folder": str(folder),
        "arguments": {
            "dtype": "bfloat16" if layout.quantized else "float32",
            "tp_size": layout.tp,
            "ep_size": layout.ep,
            "dp_size": layout.dp,
            "enable_dp_attention": layout.dp > 1,
            "enable_dp_lm_head": layout.dp_head,
            "moe_dense_tp_size": 1 if layout.dense_replicated else None,
        },
        "shared_replicated": layout.shared_replicated,
        "rank": rank,
        "shapes": hf_shapes(model),
        "slices": [
            {field: asdict(piece)[field] for field in fields}
            for piece in engine_slices(model, layout, rank)
        ],
    }


@pytest.mark.parametrize("case", CASES)
def test_sglang_puts_the_weights_where_the_table_says(
    case: str, built: dict[str, list[dict[str, Any]]]
) -> None:
    """All of them, and nothing is left but the padding of the vocabulary."""
    model, layout = CASES[case]
    held = [engine_slices(model, layout, rank) for rank in range(layout.tp)]
    for rank, found in enumerate(built[case]):
        assert found["wrong"] == []
        assert found["twice"] == []
        assert found["unfilled"].keys() <= {"model.embed_tokens.weight", "lm_head.weight"}
        for name, count in found["unfilled"].items():
            rows = [s.region[0] for s in held[rank] if s.parameter == name]
            padded = 192 // layout.parts("head" if name == "lm_head.weight" else "embedding")
            assert count == (padded - sum(b - a for a, b in rows)) * model.hidden_size
