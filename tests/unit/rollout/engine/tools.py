"""What the engine's tests share: tiny models, transformers' answers, a server's client side."""

import json
import subprocess
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r1mega.config.schema import Model, RopeScaling
from r1mega.model.hf_config import hf_config

YARN = RopeScaling(factor=40.0, original_max_position_embeddings=64)
MODELS = {
    "yarn": Model(rope_scaling=YARN, max_position_embeddings=2560),
    "plain": Model(),
    "no_q_lora": Model(q_lora_rank=None, rope_scaling=YARN, max_position_embeddings=2560),
    "one_group": Model(n_group=1, topk_group=1, num_experts_per_tok=2, rms_norm_eps=1e-5),
    "wide": Model(  # large enough for the other library of products.py
        hidden_size=256, intermediate_size=320, moe_intermediate_size=128, num_hidden_layers=2
    ),
    "qwen2": Model(architecture="qwen2", num_key_value_heads=2, tie_word_embeddings=True),
    "llama": Model(
        architecture="llama",
        hidden_size=96,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=24,
        attention_bias=True,
        max_position_embeddings=2560,
        rope_scaling=RopeScaling(
            rope_type="llama3", factor=8.0, original_max_position_embeddings=64
        ),
    ),
}
DEEPSEEK = ("yarn", "plain", "no_q_lora", "one_group", "wide")
DENSE = ("qwen2", "llama")
CONTEXT = 256


def reference(model: Model, seed: int) -> Any:
    """transformers' own network with weights large enough to make a difference."""
    from transformers import AutoConfig, AutoModelForCausalLM

    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf_config(model))).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        is_matrix = parameter.dim() > 1
        parameter.data.normal_(0.0 if is_matrix else 1.0, 0.1, generator=generator)
    for name, buffer in network.named_buffers():
        if "e_score_correction_bias" in name:
            buffer.normal_(0.0, 0.05, generator=generator)
    return network


@dataclass(frozen=True)
class Saved:
    """A model folder and transformers' network with the same weights."""

    model: Model
    folder: Path
    network: Any

    def logprobs(self, token_ids: Sequence[int], temperature: float = 1.0) -> Tensor:
        with torch.no_grad():
            logits = self.network(torch.tensor([list(token_ids)])).logits[0]
        return torch.log_softmax(logits.double() / temperature, dim=-1)

    def experts(self, token_ids: Sequence[int]) -> Tensor:
        """(token, layer, expert) of every token but the last, as an engine answers them."""
        chosen: list[Tensor] = []
        layers = self.network.model.layers
        hooks = [
            layer.mlp.gate.register_forward_hook(lambda *call: chosen.append(call[-1][2]))
            for layer in layers[self.model.first_k_dense_replace :]
        ]
        self.logprobs(token_ids[:-1])
        for hook in hooks:
            hook.remove()
        dense = [torch.zeros_like(chosen[0])] * self.model.first_k_dense_replace
        return torch.stack([*dense, *chosen], dim=1)

    def response_logprobs(
        self, prompt: Sequence[int], response: Sequence[int], temperature: float = 1.0
    ) -> Tensor:
        table = self.logprobs([*prompt, *response], temperature)[len(prompt) - 1 : -1]
        return table[torch.arange(len(response)), torch.tensor(list(response))]


@dataclass(frozen=True)
class Server:
    """A running engine process."""

    url: str
    port: int
    process: "subprocess.Popen[bytes]"

    def call(
        self, path: str, body: Any = None, *, timeout_s: float = 60.0, **headers: str
    ) -> tuple[int, Any]:
        """POST a JSON body, or GET without one: (status, parsed body)."""
        raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data=raw, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                status, text = response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        is_json = text.startswith(("{", "["))
        return status, json.loads(text) if is_json else text
