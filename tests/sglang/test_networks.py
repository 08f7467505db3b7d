"""Every network we train is the same network in SGLang, sampled as our client understands it.

transformers is the third party: the learner is compared with it in tests/distributed/test_models.
"""

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from r1mega.model.routing import routers
from r1mega.rollout.routed_experts import read_routed_experts
from tests.distributed import tiny
from tests.sglang.servers import Server, running_server

NETWORKS = {
    **tiny.MODELS,
    "deepseek_v3 without yarn": dataclasses.replace(tiny.MODEL, rope_scaling=None),
}
PROMPT = list(range(5, 25))


@dataclasses.dataclass(frozen=True)
class Served:
    name: str
    server: Server
    network: Any  # transformers' own


@pytest.fixture(scope="module", params=NETWORKS)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    folder, model = tmp_path_factory.mktemp("served"), NETWORKS[request.param]
    network = tiny.transformers_model(model, folder / "weights")
    experts = [] if model.architecture != "deepseek_v3" else ["--enable-return-routed-experts"]
    with running_server(folder, model, *experts) as server:
        server.load(folder / "weights", version=0)
        yield Served(request.param, server, network)


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
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(served.server.generate, PROMPT, 280, rid="long")
        while served.server.get("/v1/loads")["loads"][0]["num_running_reqs"] == 0:
            assert not request.done()
        served.server.post("/abort_request", rid="long")
        answer = request.result()
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    assert 0 < len(answer["output_ids"]) < 280
    expected = logprobs(served.network, PROMPT, answer["output_ids"])
    assert (returned(answer) - expected).abs().max() < 1e-5
