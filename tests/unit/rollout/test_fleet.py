"""What the learner reads of the engines, while the launcher starts and ends them."""

from pathlib import Path

from r1mega.rollout.fleet import EngineHandle, Fleet, write_engine
from r1mega.rollout.router import RouterClient


def test_an_engine_that_ends_while_they_are_listed_is_none(tmp_path: Path) -> None:
    one = EngineHandle(name="engine-1", url="http://127.0.0.1:9", pid=1, incarnation=0)
    write_engine(tmp_path, one)
    (tmp_path / "engine-0.json").symlink_to(tmp_path / "gone")  # listed, and then not there
    fleet = Fleet(tmp_path, RouterClient("http://127.0.0.1:9"), logs=tmp_path)
    assert fleet.engines() == [one]
