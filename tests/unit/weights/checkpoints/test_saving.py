"""Saving beside training: a private copy, whole or not there, and what goes wrong is said."""

import errno
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest
import torch
import torch.distributed as dist

from r1mega.parallel.layout import Layout
from r1mega.system.termination import before_sigterm
from r1mega.weights.checkpoints.checkpoint import newest, prune, read_state, saved
from r1mega.weights.checkpoints.manifest import (
    CheckpointError,
    commit,
    read_manifest,
    record_bytes,
    verify,
)
from r1mega.weights.local import LocalWeights
from r1mega.weights.slices import SliceReader
from r1mega.weights.tensor_file import TensorFile, digest_tensor
from tests.distributed.tiny import MODEL
from tests.unit.weights.savers import (
    at,
    contents,
    forked,
    join,
    local_weights,
    open_saver,
    wait_for,
)

pytestmark = pytest.mark.timeout(120)
HEAD = "lm_head.weight"


@pytest.fixture
def store() -> Iterator[dist.Store]:
    """Of a group of this process alone."""
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield store
    dist.destroy_process_group()


@pytest.fixture
def weights() -> LocalWeights:
    return local_weights(Layout(world=1), 0)


def read_head(folder: Path) -> torch.Tensor:
    shape = (MODEL.vocab_size, MODEL.hidden_size)
    with SliceReader(folder) as reader:
        return reader.read(HEAD, shape, tuple((0, size) for size in shape))


def test_what_changes_after_saving_is_not_saved(
    tmp_path: Path, store: dist.Store, weights: LocalWeights
) -> None:
    saver = open_saver(tmp_path, weights, store)
    (piece,) = [piece for piece in weights.slices if piece.hf_name == HEAD]
    for step in (1, 2):
        weights.region(piece).fill_(step)
        state = contents(step)
        saver.save(at(step), state)
        weights.region(piece).fill_(-1.0)
        state.optimizer["0/w/param"].fill_(-1.0)
    saver.finish()
    for step in (1, 2):
        folder = tmp_path / f"step_{step:06d}"
        verify(folder)
        assert read_state(folder).progress == at(step)
        assert read_head(folder).unique().tolist() == [step]
        with TensorFile.open(folder / "optimizer-00000.safetensors") as file:
            assert file.read("0/w/param").unique().tolist() == [step]
        with SliceReader(folder) as reader:
            for name, stored in reader.tensors.items():
                (piece_there,) = stored.pieces
                assert (
                    digest_tensor(reader.read_stored(name, piece_there.region))
                    == piece_there.digest
                )


def test_an_unchanged_reference_is_written_once(
    tmp_path: Path, store: dist.Store, weights: LocalWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = open_saver(tmp_path, weights, store, keep_last=2)
    reference = weights.copy_to_host()
    for step in (1, 2, 3):
        saver.save(at(step), contents(step, reference=reference))
    saver.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000002", "step_000003"]
    second, third = (
        tmp_path / f"step_00000{n}/reference/weights-00000.safetensors" for n in (2, 3)
    )
    assert second.stat().st_ino == third.stat().st_ino
    verify(tmp_path / "step_000003")

    def no_links(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    saver.save(at(4), contents(4, reference=reference))
    shutil.rmtree(tmp_path / "step_000002")
    saver.finish()
    fourth = tmp_path / "step_000004/reference/weights-00000.safetensors"
    assert fourth.stat().st_ino != third.stat().st_ino
    assert fourth.read_bytes() == third.read_bytes()
    verify(tmp_path / "step_000004")
    saver.save(at(5), contents(5, reference=weights.copy_to_host()))
    shutil.rmtree(tmp_path / "step_000003")
    saver.finish()
    verify(tmp_path / "step_000005")
    assert read_head(tmp_path / "step_000005/reference").equal(read_head(tmp_path / "step_000005"))


def test_a_reference_that_is_gone_is_written_again(
    tmp_path: Path, store: dist.Store, weights: LocalWeights
) -> None:
    saver = open_saver(tmp_path, weights, store)
    reference = weights.copy_to_host()
    saver.save(at(1), contents(1, reference=reference))
    saver.finish()
    shutil.rmtree(tmp_path / "step_000001")
    saver.save(at(2), contents(2, reference=reference))
    saver.finish()
    verify(tmp_path / "step_000002")
    assert (tmp_path / "step_000002/reference/index.json").exists()


def test_too_little_room_is_said_before_writing(
    tmp_path: Path, store: dist.Store, weights: LocalWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = open_saver(tmp_path, weights, store)
    saver.save(at(1), contents(1))
    saver.finish()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=12_345))
    with pytest.raises(CheckpointError, match=r"needs [\d,]+ bytes and the disk has 12,345 left"):
        saver.save(at(2), contents(2))
    monkeypatch.undo()
    saver.save(at(2), contents(2))
    saver.finish()
    assert newest(saved(tmp_path)) == (tmp_path / "step_000002", [])


def test_a_full_disk_is_said_by_the_next_save(tmp_path: Path) -> None:
    """By both ranks, though one alone has no room; what was saved before stands."""
    said = tmp_path / "said"
    said.mkdir()
    checkpoints = tmp_path / "checkpoints"

    def rank(number: int) -> None:
        store = join(number, 2, tmp_path / "meeting")
        saver = open_saver(checkpoints, local_weights(Layout(world=2), number), store)
        saver.save(at(1), contents(1))
        saver.finish()
        saver.save(at(2), contents(2, size=400_000 * number))
        try:
            saver.save(at(3), contents(3))
        except CheckpointError as error:
            (said / str(number)).write_text(str(error))

    for pid in [forked(lambda n=n: rank(n), largest_file=1_400_000) for n in (0, 1)]:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    sentences = {(said / str(number)).read_text() for number in (0, 1)}
    (sentence,) = sentences
    assert "step_000002 was not written: rank 1: " in sentence
    assert sentence.endswith("what was saved before it stands")
    assert [path.name for path in checkpoints.iterdir()] == ["step_000001"]
    verify(checkpoints / "step_000001")


def test_nobody_waits_for_a_save_that_did_not_start(
    tmp_path: Path, store: dist.Store, weights: LocalWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: Thread) -> None:
        raise RuntimeError("can't start new thread")

    saver = open_saver(tmp_path, weights, store)
    monkeypatch.setattr(Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="new thread"):
        saver.save(at(1), contents(1))
    saver.wind_down()
    monkeypatch.undo()
    saver.save(at(1), contents(1))
    saver.finish()
    assert newest(saved(tmp_path)) == (tmp_path / "step_000001", [])


def test_copies_and_long_numbers_do_not_confuse_the_order(tmp_path: Path) -> None:
    names = ["step_000040", "step_999999", "step_1000000"]
    for name in [*names, "step_000040.bak", "step_", "step_1000000 (copy)"]:
        (tmp_path / name).mkdir()
    assert [folder.name for folder in saved(tmp_path)] == names
    prune(tmp_path / "step_1000000", keep_last=1)
    kept = sorted(folder.name for folder in tmp_path.iterdir())
    assert kept == ["step_", "step_000040.bak", "step_1000000", "step_1000000 (copy)"]


def save_for_ever(checkpoints: Path, meeting: Path, done: Path) -> None:
    """From behind the newest on; ``done`` names the last that was said to be finished."""
    saver = open_saver(checkpoints, local_weights(Layout(world=1), 0), join(0, 1, meeting))
    found, _ = newest(saved(checkpoints))
    step = 0 if found is None else read_state(found).progress.step
    while True:
        step += 1
        saver.save(at(step), contents(step, size=1_000_000))
        saver.finish()
        done.write_text(str(step))


def kill_while_saving(root: Path, kills: int, rng: random.Random) -> None:
    checkpoints, done = root / "checkpoints", root / "done"
    checkpoints.mkdir()
    for number in range(kills):
        started = time.monotonic()
        pid = forked(lambda n=number: save_for_ever(checkpoints, root / f"meeting{n}", done))
        wait_for(lambda: list(checkpoints.glob(".step_*")))
        time.sleep(rng.uniform(0.0, 0.15))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        last = int(done.read_text() or 0) if done.exists() else 0
        found, skipped = newest(saved(checkpoints))
        assert skipped == [], f"kill {number} after {time.monotonic() - started:.3f} s"
        assert (0 if found is None else read_state(found).progress.step) >= last
        for folder in checkpoints.glob("step_*"):
            verify(folder)


def test_kill_at_any_moment_leaves_whole_checkpoints(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    kill_while_saving(tmp_path, 10, random.Random(1))

    def last() -> None:
        store = join(0, 1, tmp_path / "last")
        saver = open_saver(checkpoints, local_weights(Layout(world=1), 0), store)
        saver.save(at(10**5), contents(0))
        saver.finish()

    assert os.waitstatus_to_exitcode(os.waitpid(forked(last), 0)[1]) == 0
    assert not list(checkpoints.glob(".*"))


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_many_kills(tmp_path: Path) -> None:
    kill_while_saving(tmp_path, 300, random.Random(2))


def test_sigterm_waits_for_the_save(tmp_path: Path) -> None:
    """While the main thread is in a call that does not return."""
    checkpoints = tmp_path / "checkpoints"

    def work() -> None:
        store = join(0, 1, tmp_path / "meeting")
        saver = open_saver(checkpoints, local_weights(Layout(world=1), 0), store)
        with before_sigterm(saver.wind_down):
            saver.save(at(1), contents(1, size=20_000_000))
            (tmp_path / "saving").touch()
            store.wait(["never"])

    pid = forked(work)
    wait_for((tmp_path / "saving").exists)
    os.kill(pid, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGTERM
    assert newest(saved(checkpoints)) == (checkpoints / "step_000001", [])


@pytest.fixture
def whole(tmp_path: Path, store: dist.Store, weights: LocalWeights) -> Path:
    """A checkpoint with all kinds of files."""
    saver = open_saver(tmp_path / "checkpoints", weights, store)
    saver.save(at(1), contents(1, reference=weights.copy_to_host()))
    saver.finish()
    return tmp_path / "checkpoints/step_000001"


def test_every_flipped_bit_is_found(whole: Path) -> None:
    rng = random.Random(3)
    files = sorted(path for path in whole.rglob("*") if path.is_file())
    assert len(files) == 9
    for number in range(100):
        path = files[number % len(files)]
        good = path.read_bytes()
        data = bytearray(good)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        with pytest.raises(CheckpointError):
            verify(whole)
        path.write_bytes(good)
    verify(whole)


@pytest.mark.parametrize(
    "name",
    ["index.json", "state.json", "manifest.json", "weights-00000.safetensors", "hf/config.json"],
)
def test_missing_and_truncated_files_are_named(name: str, whole: Path) -> None:
    path = whole / name
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=name):
        verify(whole)
    path.unlink()
    with pytest.raises(CheckpointError, match=name):
        verify(whole)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "hf/../../x"])
def test_a_manifest_that_points_elsewhere_is_refused(name: str, whole: Path) -> None:
    files = read_manifest(whole) | {name: record_bytes(b"")}
    commit(whole.rename(whole.with_name("other")), whole, files)
    with pytest.raises(CheckpointError, match="is not inside"):
        verify(whole)


def test_the_earlier_format_is_refused(whole: Path) -> None:
    (whole / "manifest.json").write_text('{"format": "r1mega-checkpoint-1", "files": {}}')
    with pytest.raises(CheckpointError, match="has the format 'r1mega-checkpoint-1'"):
        verify(whole)
