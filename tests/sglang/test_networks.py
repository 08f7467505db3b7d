"""Every network we train is the same network in SGLang, sampled as our client understands it.

transformers is the third party: the learner is compared with it in tests/distributed/test_models.
"""

import dataclasses
import json
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from r1mega.model.routing import routers
from r1mega.rollout.checksum import cpu_checksum
from r1mega.rollout.predict import engine_parameters, predicted_checksums
from r1mega.rollout.routed_experts import read_routed_experts
from r1mega.weights.engine_names import EngineLayout
from r1mega.weights.tensor_file import TensorFile
from tests.distributed import tiny
from tests.sglang.servers import Server, running_server

NETWORKS = {
    name: dataclasses.replace(model, max_position_embeddings=2048)
    for name, model in {
        **tiny.MODELS,
        "deepseek_v3 without yarn": dataclasses.replace(tiny.MODEL, rope_scaling=None),
    }.items()
}
PROMPT = list(range(5, 25))


@dataclasses.dataclass(frozen=True)
class Served:
    name: str
    server: Server
    folder: Path  # of its weights
    network: Any  # transformers' own, with the same


@pytest.fixture(scope="module", params=NETWORKS)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    folder, model = tmp_path_factory.mktemp("served"), NETWORKS[request.param]
    network = tiny.transformers_model(model, folder / "weights")
    experts = [] if model.architecture != "deepseek_v3" else ["--enable-return-routed-experts"]
    with running_server(folder, model, *experts) as server:
        server.load(folder / "weights", version=0)
        yield Served(request.param, server, folder / "weights", network)


def logprobs(network: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    with torch.no_grad():
        table = network(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    rows = range(len(prompt) - 1, len(prompt) + len(response) - 1)
    return table[list(rows), response]


def returned(answer: dict[str, Any]) -> torch.Tensor:
    return torch.tensor([entry[0] for entry in answer["meta_info"]["output_token_logprobs"]])


def test_logprobs_equal_transformers(served: Served) -> None:
    for length in (1, 20, 120):
        prompt = [(7 * i) % 60 for i in range(length)]
        answer = served.server.generate(prompt, 40)
        expected = logprobs(served.network, prompt, answer["output_ids"])
        assert (returned(answer) - expected).abs().max() < 1e-5


def test_a_seed_draws_the_same_tokens_in_any_company(served: Served) -> None:
    alone = [served.server.generate(PROMPT, 24, seed=seed)["output_ids"] for seed in (3, 4)]
    with ThreadPoolExecutor(3) as pool:
        others = [(PROMPT, 4), (PROMPT[:9], 5), (PROMPT, 3)]
        answers = pool.map(lambda one: served.server.generate(one[0], 24, seed=one[1]), others)
        together = [answer["output_ids"] for answer in answers]
    assert [together[2], together[0]] == alone
    assert alone[0] != alone[1]


def test_routed_experts_are_those_of_transformers(served: Served) -> None:
    """Of every token but the last, sorted: SGLang gives them in no order."""
    model = NETWORKS[served.name]
    if model.architecture != "deepseek_v3":
        pytest.skip("a dense model")
    chosen: list[torch.Tensor] = []
    gates = [layer.mlp for layer in served.network.model.layers[model.first_k_dense_replace :]]
    hooks = [
        gate.experts.register_forward_pre_hook(lambda _, inputs: chosen.append(inputs[1]))
        for gate in gates
    ]
    answer = served.server.generate(PROMPT, 16, return_routed_experts=True)
    logprobs(served.network, PROMPT, answer["output_ids"])
    for hook in hooks:
        hook.remove()
    found = read_routed_experts(
        answer["meta_info"]["routed_experts"], len(PROMPT) + 16, routers(model)
    )
    assert found.dtype == "uint8"
    shape = (len(PROMPT) + 15, len(gates), model.num_experts_per_tok)
    ids_TMK = torch.frombuffer(bytearray(found.ids), dtype=torch.uint8).reshape(shape)
    expected_TMK = torch.stack([ids_TK[:-1] for ids_TK in chosen], dim=1)
    assert ids_TMK.sort().values.tolist() == expected_TMK.sort().values.tolist()


def test_an_aborted_request_keeps_what_it_has(served: Served) -> None:
    sampling = {"max_new_tokens": 1900, "ignore_eos": True}
    request = {"input_ids": PROMPT, "sampling_params": sampling, "return_logprob": True}
    body = json.dumps({**request, "rid": "long", "stream": True}).encode()
    url, kind = f"{served.server.url}/generate", {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, body, kind), timeout=60) as stream:
        stream.readline()  # the first tokens
        served.server.post("/abort_request", rid="long")
        events = [line.removeprefix(b"data: ") for line in stream if line.startswith(b"data: {")]
    answer = json.loads(events[-1])
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    assert 0 < len(answer["output_ids"]) < 1900
    expected = logprobs(served.network, PROMPT, answer["output_ids"])
    assert (returned(answer) - expected).abs().max() < 1e-5


def test_checksums_are_those_we_predict_until_a_value_changes(served: Served) -> None:
    parameters = engine_parameters(
        NETWORKS[served.name], EngineLayout(), 0, dtype=torch.float32, checksum=cpu_checksum
    )
    with TensorFile.open(served.folder / "model.safetensors") as file:
        predicted = predicted_checksums(
            parameters, lambda names: ((name, file.read(name)) for name in names)
        )
    expected = {name: checksum for (_, name), checksum in predicted.items()}
    assert checksums(served.server) == expected
    served.server.post("/weights_checker", action="reset_tensors")
    assert not checksums(served.server).items() & expected.items()
    served.server.load(served.folder, version=1)
    assert checksums(served.server) == expected


def checksums(server: Server) -> dict[str, str]:
    (rank,) = server.post("/weights_checker", action="checksum")["ranks"]
    return dict(rank["checksums"])
