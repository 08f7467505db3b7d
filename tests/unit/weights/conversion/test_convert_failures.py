"""What may go wrong while converting: one sentence, nothing that looks complete, and a way on."""

import ctypes
import json
import os
import random
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from r1mega.model.hf_config import hf_config
from r1mega.weights.checkpoints.manifest import FileRecord, commit, verify
from r1mega.weights.conversion.convert import hf_to_megatron, megatron_to_hf
from r1mega.weights.conversion.copying import JOURNAL
from r1mega.weights.conversion.journal import Journal
from tests.unit.weights.conversion.test_convert import (
    Listening,
    assert_same,
    convert,
    export,
    read_all,
    with_mtp,
)
from tests.unit.weights.weight_folders import LLAMA, V3, quantized, random_weights, write_hf

AXES = {"tp": 2, "pp": 2, "ep": 2}
LAST = "model-1.safetensors"  # of a folder that write_hf wrote


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return write_hf(tmp_path / "hf", V3, with_mtp(V3))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def drop_from_index(folder: Path, name: str) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"][name]
    path.write_text(json.dumps(index))


def truncate(folder: Path) -> None:
    os.truncate(folder / LAST, (folder / LAST).stat().st_size - 1)


def flip_in_header(folder: Path) -> None:
    flip(folder / LAST, 8 * 40 + 3)


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def describe(folder: Path, **change: object) -> None:
    (folder / "config.json").write_text(json.dumps(hf_config(V3) | change))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, r"model-1\.safetensors is damaged"),
    "header": (flip_in_header, r"model-1\.safetensors"),
    "missing file": (
        lambda f: (f / LAST).unlink(),
        r"model-1\.safetensors cannot be read: No such",
    ),
    "another size": (lambda f: describe(f, vocab_size=128), r"embed_tokens.weight has shape \[96"),
    "more layers": (
        lambda f: describe(f, num_hidden_layers=5),
        r"has no 'model\.layers\.4\..* 3 more: .* is this a checkpoint of another model",
    ),
    "fewer layers": (lambda f: describe(f, num_hidden_layers=3), r"'model\.layers\.4\."),
    "not json": (lambda f: (f / "config.json").write_text("{"), r"config\.json"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json"),
    "missing tensor": (
        lambda f: drop_from_index(f, "model.norm.weight"),
        r"no tensor 'model\.norm\.weight'",
    ),
    "half an MTP layer": (
        lambda f: drop_from_index(f, "model.layers.4.eh_proj.weight"),
        r"the MTP layers are there in part only, without 'model\.layers\.4\.eh_proj\.weight'",
    ),
    "no folder": (lambda f: f.rename(f.with_name("elsewhere")), r"hf: No such file"),
}


@pytest.mark.parametrize(("damage", "sentence"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_bad_source_is_refused_before_anything_is_written(
    hf: Path, damage: Callable[[Path], object], sentence: str
) -> None:
    damage(hf)
    with pytest.raises(ValueError, match=sentence):
        convert(hf, hf.parent / "out", **AXES)
    assert not [path for path in hf.parent.iterdir() if "out" in path.name]


def test_extra_and_misshaped_tensors_are_named(tmp_path: Path) -> None:
    weights = random_weights(LLAMA)
    write_hf(tmp_path / "a", LLAMA, weights | {"model.layers.0.mlp.extra.weight": torch.ones(2)})
    with pytest.raises(ValueError, match=r"has no 'model\.layers\.0\.mlp\.extra\.weight'"):
        convert(tmp_path / "a", tmp_path / "out")
    write_hf(tmp_path / "b", LLAMA, weights | {"model.norm.weight": torch.ones(2)})
    with pytest.raises(ValueError, match=r"model\.norm\.weight has shape \[2\] but the model"):
        convert(tmp_path / "b", tmp_path / "out")


def test_nothing_is_overwritten(hf: Path) -> None:
    out = hf.parent / "out"
    out.mkdir()
    (out / "mine").write_text("precious")
    with pytest.raises(ValueError, match="out is there and not empty"):
        convert(hf, out)
    (out / "mine").unlink()
    export(convert(hf, out), hf.parent / "back")  # an empty folder is as good as none
    assert [path.name for path in hf.parent.iterdir() if path.name.startswith(".")] == []


def test_the_source_stays_as_it_is(hf: Path) -> None:
    before = contents(hf)
    for out in (hf / "out", hf / "a/../b/out", hf.parent / "hf"):
        with pytest.raises(ValueError, match=r"is inside .*hf, which is only read"):
            convert(hf, out)
    assert contents(hf) == before


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_is_written_through(is_there: bool, hf: Path) -> None:
    """Where it leads there may be more room than where it is."""
    (target := hf.parent / "large/disk").mkdir(parents=True)
    (link := hf.parent / "out").symlink_to(target if is_there else target / "new")
    convert(hf, link)
    assert link.is_symlink()
    assert (link / "manifest.json").is_file()
    assert {path.name for path in hf.parent.iterdir()} == {"hf", "large", "out"}


def test_every_flipped_bit_of_a_checkpoint_is_found(tmp_path: Path) -> None:
    folder = convert(write_hf(tmp_path / "hf", LLAMA, random_weights(LLAMA)), tmp_path / "a", tp=2)
    files = [path for path in folder.rglob("*") if path.is_file()]
    draw = random.Random(0)
    for number in range(100):
        path = draw.choice(files)
        bit = draw.randrange(8 * path.stat().st_size)
        flip(path, bit)
        with pytest.raises(ValueError, match=re.escape(str(folder))):
            export(folder, tmp_path / f"out{number}")
        assert not (tmp_path / f"out{number}").exists()
        flip(path, bit)
    export(folder, tmp_path / "out")


def test_a_flipped_bit_in_a_header_changes_no_tensor_silently(tmp_path: Path) -> None:
    weights = random_weights(LLAMA)
    folder = write_hf(tmp_path / "hf", LLAMA, weights, files=1)
    path = folder / "model-0.safetensors"
    length = int.from_bytes(path.read_bytes()[:8], "little")
    draw = random.Random(0)
    refused = 0
    for number in range(100):
        bit = draw.randrange(8 * (8 + length))
        flip(path, bit)
        try:
            convert(folder, tmp_path / f"out{number}")
        except ValueError:
            refused += 1
            assert not (tmp_path / f"out{number}").exists()
        else:  # it was in the header's metadata
            assert_same(read_all(tmp_path / f"out{number}"), weights)
        flip(path, bit)
    assert refused >= 95


def test_a_missing_rank_file_is_named(hf: Path) -> None:
    folder = convert(hf, hf.parent / "a", tp=2)
    (folder / "weights-00001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"weights-00001\.safetensors cannot be read: No such"):
        export(folder, hf.parent / "out")


class Stopping(Listening):
    """Does ``act`` in the thread that reports for the ``count``-th time."""

    def __init__(self, count: int, act: Callable[[], object]) -> None:
        super().__init__()
        self._left, self._act = count, act

    def progress(self, what: str, done: int, total: int) -> None:
        super().progress(what, done, total)
        self._left -= 1
        if self._left == 0:
            self._act()


class Counting(Listening):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def progress(self, what: str, done: int, total: int) -> None:
        self.count += 1


@pytest.mark.parametrize("direction", ["to megatron", "to hf"])
def test_killed_anywhere_it_goes_on_to_the_same_bytes(
    direction: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("r1mega.weights.streams.BAND_BYTES", 2_000)  # many bands to be killed at
    source = write_hf(tmp_path / "hf", V3, quantized(with_mtp(V3), V3))
    if direction == "to hf":
        source = convert(source, tmp_path / "ours", **AXES)

    def work(out: Path, listener: Listening) -> None:
        if direction == "to hf":
            megatron_to_hf(source, out, listener, shard_bytes=100_000)
        else:
            hf_to_megatron(source, out, listener, **AXES)

    counting = Counting()
    work(tmp_path / "whole", counting)
    expected = contents(tmp_path / "whole")
    draw = random.Random(0)
    for number in range(10):
        out = tmp_path / f"out{number}"
        at = draw.randrange(1, counting.count)
        stopping = Stopping(at, lambda: os.kill(os.getpid(), signal.SIGKILL))
        child = get_context("fork").Process(target=work, args=(out, stopping))
        child.start()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
        assert not out.exists()
        listening = Listening()
        work(out, listening)
        assert listening.notes == [f"going on with what is in {tmp_path / f'.out{number}.partial'}"]
        assert contents(out) == expected


@pytest.fixture
def minds_ctrl_c() -> Iterator[None]:
    """A process that was started in the background ignores it, and so do its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("minds_ctrl_c")
def test_what_was_done_before_ctrl_c_is_not_done_again(hf: Path) -> None:
    out = hf.parent / "out"
    interrupting = Stopping(100, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        hf_to_megatron(hf, out, interrupting)
    with Journal(hf.parent / ".out.partial" / JOURNAL) as journal:
        done = len(journal.done)
    assert done >= 90
    counting = Counting()
    hf_to_megatron(hf, out, counting)
    whole = Counting()
    hf_to_megatron(hf, hf.parent / "again", whole)
    assert counting.count == whole.count - done
    assert contents(out) == contents(hf.parent / "again")


def test_another_source_or_layout_starts_anew(hf: Path) -> None:
    out = hf.parent / "out"
    for axes in ({"tp": 2}, {"tp": 4}):
        with pytest.raises(ZeroDivisionError):
            hf_to_megatron(hf, out, Stopping(100, lambda: 1 / 0), **axes)
    edit(hf / LAST, lambda tensors: tensors.update({n: t + 1 for n, t in tensors.items()}))
    listening = Listening()
    hf_to_megatron(hf, out, listening, tp=4)
    (note,) = listening.notes
    assert note.startswith("starting anew: ")
    hf_to_megatron(hf, hf.parent / "again", Listening(), tp=4)
    assert contents(out) == contents(hf.parent / "again")


def test_two_at_a_time_are_refused(hf: Path) -> None:
    partial = hf.parent / ".out.partial"
    partial.mkdir()
    with (
        Journal(partial / JOURNAL),
        pytest.raises(ValueError, match=r"another process is at work in .*\.out\.partial"),
    ):
        convert(hf, hf.parent / "out")


def test_a_second_one_is_refused_until_the_first_has_its_name(
    hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All weights are there by then; one for another layout would wipe them from under it."""
    out, refused = hf.parent / "out", []

    def interfere(partial: Path, folder: Path, files: Mapping[str, FileRecord]) -> None:
        for when in (lambda: None, lambda: commit(partial, folder, files)):
            when()
            with pytest.raises(ValueError, match=r"another process|is there and not") as error:
                convert(hf, out, tp=4)
            refused.append(str(error.value))

    monkeypatch.setattr("r1mega.weights.conversion.convert.commit", interfere)
    convert(hf, out, tp=2)
    assert len(refused) == 2
    assert {path.name for path in hf.parent.iterdir()} == {"hf", "out"}
    verify(out)


def test_what_is_read_back_wrong_is_not_committed(hf: Path) -> None:
    out = hf.parent / "out"
    file = hf.parent / ".out.partial" / "weights-00000.safetensors"
    bits = 8 * (hf / LAST).stat().st_size

    class Damaging(Listening):
        def progress(self, what: str, done: int, total: int) -> None:
            if what == "verified" and not self.last:
                flip(file, bits - 9)
                super().progress(what, done, total)

    with pytest.raises(ValueError, match=r"weights-00000.*read back is not what was written"):
        hf_to_megatron(hf, out, Damaging())
    assert not out.exists()
    convert(hf, out)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small disk")
    libc = ctypes.CDLL(None, use_errno=True)
    disk = tmp_path / "disk"
    disk.mkdir()
    if libc.mount(b"tmpfs", bytes(disk), b"tmpfs", 0, b"size=2m") != 0:
        pytest.skip(f"no mount here: {os.strerror(ctypes.get_errno())}")
    yield disk
    libc.umount2(bytes(disk), 2)  # MNT_DETACH


def test_a_disk_that_is_too_small_is_known_before(hf: Path, small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(1_500_000))
    with pytest.raises(ValueError, match=r"disk has 0\.\d+ GB free, but 0\.\d+ GB are to be writ"):
        convert(hf, small_disk / "out")
    assert not (small_disk / "out").exists()


def test_a_disk_that_fills_up_halfway_costs_nothing(hf: Path, small_disk: Path) -> None:
    filler, out = small_disk / "filler", small_disk / "out"

    def fill() -> None:
        with filler.open("wb", buffering=0) as file:
            while True:
                try:
                    file.write(bytes(4096))
                except OSError:
                    return

    with pytest.raises(ValueError, match=r"out was not finished: .*No space left.* goes on from"):
        hf_to_megatron(hf, out, Stopping(100, fill))
    assert not out.exists()
    filler.unlink()
    listening = Listening()
    hf_to_megatron(hf, out, listening)
    assert listening.notes[0].startswith("going on")
    hf_to_megatron(hf, hf.parent / "again", Listening())
    assert contents(out) == contents(hf.parent / "again")
