"""An engine that does not hold what was sent is found after the sync, whatever is wrong with it."""

import errno
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch import Tensor

from r1mega.parallel.collectives import Team
from r1mega.parallel.layout import Layout
from r1mega.records import Batch, Sequence
from r1mega.rollout import control, transfer
from r1mega.rollout.broadcast import quantized
from r1mega.rollout.checksum import cpu_checksum
from r1mega.rollout.disk import Disk
from r1mega.rollout.fleet import Fleet
from r1mega.rollout.proof import Proof
from r1mega.rollout.publish import SyncFailed
from r1mega.rollout.router import RouterClient
from r1mega.rollout.sampler import HttpSampler
from r1mega.weights import fp8
from r1mega.weights.names import fp8_weights
from r1mega.weights.tensor_file import TensorFile
from tests.distributed.fleets import MODEL, SAMPLING, RunningFleet, requests, running_fleet
from tests.distributed.publishing import (
    Source,
    Tampering,
    broadcast,
    checksums,
    companions,
    local_weights,
    probe,
    publisher,
    put,
)

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
FP8 = fp8_weights(MODEL)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningFleet]:
    """One for all tests here: who is in quarantine is the client's knowledge."""
    with running_fleet(tmp_path_factory.mktemp("fleet"), 2) as running:
        yield running


@pytest.fixture
def client(fleet: RunningFleet) -> Fleet:
    client = fleet.client()
    client.wait_ready(2, 60)
    return client


def wrong_tensor(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    return tensors | {name: tensors[name].flip(0)}


def flipped_bias(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of one expert."""
    bias = tensors[BIAS].clone()
    bias[bias.argmax()] *= -1
    return tensors | {BIAS: bias}


@pytest.mark.parametrize(("tamper", "name"), [(wrong_tensor, "kv_b_proj"), (flipped_bias, BIAS)])
def test_altered_memory_is_found_by_checksums_and_the_engine_is_out(
    fleet: RunningFleet,
    client: Fleet,
    tmp_path: Path,
    tamper: Callable,
    name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = Source(seed=3)
    carrier = Tampering(broadcast(source), tmp_path / "altered", lambda: tamper(source.tensors))
    published = publisher(client, carrier, Proof(checksums=checksums(source, "all")))
    report = published.publish(3)
    assert report.engines == ("engine-0",)
    assert "engine-1" in caplog.text
    assert f"in 1 of {len(source.tensors)} parameters compared, the first is" in caplog.text
    assert f"{name}" in caplog.text
    zero, one = client.engines()
    assert control.get(f"{one.url}/model_info", timeout_s=30)["weight_version"] == "3"  # it says so
    assert set(RouterClient(fleet.router_url).workers()) == {zero.url}
    assert_drawn_from(source, fleet, version=3)  # nothing that could be trained on is its
    assert published.publish(4).engines == ("engine-0",)  # and nothing will be


def assert_drawn_from(source: Source, fleet: RunningFleet, version: int) -> None:
    sampler = HttpSampler(
        url=fleet.router_url, concurrency=8, timeout_s=60, max_retries=3, expected_version=version
    )
    asked = requests(num_prompts=4, per_prompt=2)
    drawn = [
        Sequence(
            uid=sample.uid,
            token_ids=(*request.prompt.token_ids, *sample.token_ids),
            start=len(request.prompt.token_ids),
            sampler_logprobs=sample.sampler_logprobs,
        )
        for request, sample in zip(asked, sampler(asked, SAMPLING), strict=True)
    ]
    for sequence, logprobs in zip(drawn, source.logprobs(Batch(tuple(drawn))), strict=True):
        assert logprobs == pytest.approx(sequence.sampler_logprobs, abs=1e-4)


@pytest.mark.parametrize("tamper", [wrong_tensor, flipped_bias])
def test_altered_memory_is_found_by_the_probe_alone(
    client: Fleet, tmp_path: Path, tamper: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    source = Source(seed=5)
    carrier = Tampering(broadcast(source), tmp_path / "altered", lambda: tamper(source.tensors))
    report = publisher(client, carrier, Proof(probe=probe(source))).publish(5)
    assert report.engines == ("engine-0",)
    assert report.probe_difference > 1e-4  # of the one that is out
    assert "engine-1" in caplog.text
    assert "log-probs differ from the learner's by" in caplog.text


def test_stale_prefix_cache_is_found_by_the_probe(
    client: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are right, and so are their checksums."""
    source = Source(seed=6)
    proof = Proof(checksums=checksums(source, "all"), probe=probe(source))
    published = publisher(client, broadcast(source), proof)
    report = published.publish(6)
    assert report.engines == ("engine-0", "engine-1")
    assert report.probe_difference < 1e-5
    original = transfer._update_body

    def unflushed(*args: object, **kwargs: object) -> dict[str, object]:
        return original(*args, **kwargs) | {"flush_cache": False}  # type: ignore[arg-type]

    monkeypatch.setattr(transfer, "_update_body", unflushed)
    source.seed = 7
    with pytest.raises(SyncFailed, match=r"engine-0: its log-probs differ .* prefix cache"):
        published.publish(7)
    assert client.usable() == []


def test_any_single_tensor_is_found(client: Fleet, tmp_path: Path) -> None:
    source = Source(seed=8)
    publisher(client, broadcast(source)).publish(8)
    engines = tuple(client.engines())
    compared = checksums(source, "all")
    for name in source.tensors:
        altered = source.tensors
        altered[name].view(-1)[-1] += 1e-3
        put(engines[1], tmp_path / "altered", altered)
        verified, failures = compared.compare(engines, 8)
        assert verified == len(altered)
        assert list(failures) == [engines[1].url]
        assert (
            f"in 1 of {verified} parameters compared, the first is {name} on its rank 0"
            in (failures[engines[1].url])
        )


def test_quantized_sync_is_the_dequantized_weights_bit_for_bit(
    client: Fleet, tmp_path: Path
) -> None:
    source = Source(seed=9)
    proof = Proof(checksums=checksums(source, "all", FP8))
    carriers = (broadcast(lambda: quantized(source(), FP8)), disk(source, tmp_path, FP8))
    for version, carrier in enumerate(carriers, start=9):
        report = publisher(client, carrier, proof).publish(version)
        assert report.engines == ("engine-0", "engine-1")
        assert report.verified == 2 * len(source.tensors)
        full = 2 * sum(tensor.nbytes for tensor in source.tensors.values())
        assert report.bytes < 0.4 * full
        expected = {
            name: fp8.dequantize(*fp8.quantize(tensor)) if name in FP8 else tensor
            for name, tensor in source.tensors.items()
        }
        for engine in client.engines():
            answer = control.post(
                f"{engine.url}/weights_checker", {"action": "checksum"}, timeout_s=30
            )
            assert answer["ranks"][0]["checksums"] == {
                name: cpu_checksum(tensor) for name, tensor in expected.items()
            }


def test_disk_that_takes_no_folder_is_a_sentence(client: Fleet, tmp_path: Path) -> None:
    carrier = disk(Source(), tmp_path)
    (tmp_path / "versions").write_text("a file in its place")
    with pytest.raises(SyncFailed, match=r"could not be written for the engines: .*versions"):
        publisher(client, carrier).publish(1)


def test_disk_leaves_nothing_of_a_version_that_did_not_fit(
    client: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TensorFile, "write", fails)
    with pytest.raises(SyncFailed, match="No space left on device"):
        publisher(client, disk(Source(), tmp_path)).publish(1)
    assert not (tmp_path / "versions").exists()


def disk(source: Source, folder: Path, fp8_names: frozenset[str] = frozenset()) -> Disk:
    return Disk(
        local_weights(source, Layout(world=1), 0),
        list(source.tensors),
        folder=folder / "versions",
        companions=companions(folder / "companions"),
        team=Team(),
        quantized=fp8_names,
        timeout_s=30.0,
    )
