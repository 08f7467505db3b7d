"""A transfer to a real server that breaks: the server lives, says so, and takes the next one."""

import threading
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from r1mega.rollout.fleet import EngineHandle
from r1mega.rollout.p2p.invite import invite_sglang
from r1mega.rollout.p2p.messages import Piece, Turns
from r1mega.rollout.p2p.receiver import REPORT_BYTES, Invitation, leave, read_report
from r1mega.rollout.p2p.sender import Outgoing, queue, send_all
from r1mega.rollout.p2p.wire import Wire
from r1mega.rollout.wire import join_group
from r1mega.system.processes import free_port
from tests.distributed.tiny import MODEL
from tests.sglang.servers import Server, running_server

pytestmark = pytest.mark.timeout(400)
NORM = Outgoing("norm", ((0, 64),), Piece("model.norm.weight", ((0, 64),), "float32"))
UNKNOWN = Outgoing("norm", ((0, 64),), Piece("model.abnorm.weight", ((0, 64),), "float32"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("served"), MODEL) as started:
        yield started


def transfer(server: Server, item: Outgoing | None, name: str) -> str:
    """One tensor from one sender, who leaves without sending when there is no item; the report."""
    port = free_port()
    invitation = Invitation(
        address="127.0.0.1",
        port=port,
        group=f"r1mega-p2p-{name}",
        backend="gloo",
        world=2,
        learners=1,
        receiver="engine-0",
        rank=1,
        senders=(0,),
        join_timeout_s=60.0,
        timeout_s=30.0,
    )
    engine = EngineHandle(name="engine-0", url=server.url, pid=0, incarnation=0)
    server.post("/begin_weight_update")
    call = threading.Thread(target=invite_sglang, args=(engine, [invitation], 100.0))
    call.start()
    text = _send(port, invitation.group, item)
    call.join()
    server.post("/end_weight_update")
    return text


def _send(port: int, name: str, item: Outgoing | None) -> str:
    group = join_group(
        address="127.0.0.1",
        port=port,
        rank=0,
        world_size=2,
        name=name,
        backend="gloo",
        join_timeout_s=60.0,
        timeout_s=30.0,
    )
    dist.barrier(group)
    wire, text = Wire(group, torch.device("cpu"), lambda rank: "engine-0"), "left"
    if item is not None:
        values = torch.full((64,), 2.0)
        send_all(wire, {1: queue([item], 1 << 20)}, lambda _: values, rank=0, turns=Turns(1, 2))
        report = torch.empty(REPORT_BYTES, dtype=torch.uint8)
        wire.receive(report, 1, "the report").wait()
        text = read_report(report)
    leave(name)
    return text


def norm_checksum(server: Server) -> str:
    found = server.post("/weights_checker", action="checksum")["ranks"][0]["checksums"]
    return str(found["model.norm.weight"])


def test_broken_transfers_leave_the_server_alive(server: Server) -> None:
    version, before = server.get("/model_info")["weight_version"], norm_checksum(server)
    assert transfer(server, None, "left") == "left"
    said = transfer(server, UNKNOWN, "unknown")
    assert said == (
        "engine-0: learner rank 0 sends what does not fit: there is no tensor "
        "'model.abnorm.weight' here"
    )
    assert server.get("/model_info")["weight_version"] == version
    assert norm_checksum(server) == before
    assert transfer(server, NORM, "good") == ""
    assert norm_checksum(server) != before
    server.post("/update_weight_version", new_version="7", abort_all_requests=False)
    assert server.get("/model_info")["weight_version"] == "7"
    assert len(server.generate([5, 6, 7], 4)["output_ids"]) == 4
