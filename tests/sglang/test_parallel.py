"""Servers of several ranks hold what ``weights.engine_names`` says, rank by rank.

On CPU, SGLang widens experts whose part is no multiple of 32 and adds heads where they do not
divide: these sizes need neither. ``test_engine_names`` has the layouts that only GPUs serve.
"""

import dataclasses
from pathlib import Path

import pytest
import torch

from r1mega.cluster.engine_layout import engine_layout
from r1mega.config.schema import Config, Rollout
from r1mega.rollout.checksum import cpu_checksum
from r1mega.rollout.predict import engine_parameters, predicted_checksums
from r1mega.weights.tensor_file import TensorFile
from tests.distributed import tiny
from tests.sglang.servers import running_server
from tests.sglang.test_networks import PROMPT, logprobs, returned

V3 = dataclasses.replace(tiny.MODEL, moe_intermediate_size=64)
SERVERS = {
    "tp2": (V3, ["--tp-size", "2"]),
    "tp2 ep2": (V3, ["--tp-size", "2", "--ep-size", "2"]),
    "tp2 attention dp2": (V3, ["--tp-size", "2", "--attn-dp-size", "2"]),
    "llama tp2": (tiny.MODELS["llama"], ["--tp-size", "2"]),
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SERVERS)
def test_every_rank_holds_what_we_predict(name: str, tmp_path: Path) -> None:
    model, flags = SERVERS[name]
    network = tiny.transformers_model(model, tmp_path / "weights")
    layout = engine_layout(Config(rollout=Rollout(engine="sglang", sglang_args=flags)))
    expected: list[dict[str, str]] = [{}, {}]
    with TensorFile.open(tmp_path / "weights/model.safetensors") as file:
        for rank, checksums in enumerate(expected):
            parameters = engine_parameters(
                model, layout, rank, dtype=torch.float32, checksum=cpu_checksum
            )
            predicted = predicted_checksums(
                parameters, lambda names: ((name, file.read(name)) for name in names)
            )
            checksums.update({name: checksum for (_, name), checksum in predicted.items()})
    with running_server(tmp_path, model, *flags, "--disable-shared-experts-fusion") as server:
        server.load(tmp_path / "weights", version=0)
        ranks = server.post("/weights_checker", action="checksum")["ranks"]
        # Every attention replica answers for all ranks.
        assert [rank["checksums"] for rank in ranks] == expected * layout.dp
        if layout.ep == layout.dp == 1:  # else it wants kernels that are not there on CPUs
            answer = server.generate(PROMPT, 24)
            against = logprobs(network, PROMPT, answer["output_ids"])
            assert (returned(answer) - against).abs().max() < 1e-5
