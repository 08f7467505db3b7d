"""Records travel without pickle; a wait for a slow rank outlasts the collectives' timeout."""

import time
from datetime import timedelta
from typing import Any

import pytest

from tests.distributed.launch import run_ranks

TIMEOUT_S = 3.0


def patient(patience: bool) -> list[str]:
    """Runs on every rank: rank 0 comes late, longer than a collective may take."""
    import torch
    import torch.distributed as dist

    from r1mega.parallel.collectives import gather_records, wait_for_all

    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_S))
    if dist.get_rank() == 0:
        time.sleep(2 * TIMEOUT_S)
    if patience:
        wait_for_all("the late one")
    mine = f"rank {dist.get_rank()}"
    return gather_records(mine, str, group=dist.group.WORLD, device=torch.device("cpu"))


def test_a_wait_outlasts_the_timeout_of_collectives() -> None:
    assert run_ranks(__name__, "patient", world=2, patience=True) == [["rank 0", "rank 1"]] * 2


def test_without_it_the_collective_gives_up() -> None:
    with pytest.raises(AssertionError, match=r"[Tt]imed out"):
        run_ranks(__name__, "patient", world=2, patience=False)


def records() -> dict[str, Any]:
    """Runs on every rank: unequal sizes, nested records, floats to the last bit."""
    import torch
    import torch.distributed as dist

    from r1mega.parallel.collectives import broadcast_record, gather_records
    from r1mega.records import Score

    dist.init_process_group("gloo")
    rank, cpu = dist.get_rank(), torch.device("cpu")
    mine = [Score(value=0.1 * rank, parts={"x": 1 / 3}, reason="r" * rank)] * rank
    gathered = gather_records(mine, list[Score], group=dist.group.WORLD, device=cpu)
    told = broadcast_record(
        mine if rank == 2 else None, list[Score], source=2, group=dist.group.WORLD, device=cpu
    )
    return {
        "sizes": [len(part) for part in gathered],
        "exact": gathered[2][1] == Score(value=0.2, parts={"x": 1 / 3}, reason="rr"),
        "told": told == gathered[2],
    }


def test_records_arrive_as_they_left() -> None:
    for facts in run_ranks(__name__, "records", world=3):
        assert facts == {"sizes": [0, 1, 2], "exact": True, "told": True}
