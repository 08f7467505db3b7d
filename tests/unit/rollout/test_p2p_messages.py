"""How slices are packed into messages and in which order messages go; what SGLang has to import."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1mega.rollout.p2p.messages import (
    Message,
    Piece,
    Turns,
    decode_header,
    encode_header,
    in_turn,
    pack,
    split,
)
from r1mega.rollout.p2p.sender import Outgoing, in_rows

MIB = 1 << 20


def test_spans_are_aligned_and_a_lone_piece_is_its_message():
    pieces = (
        Piece("norm", ((0, 5),), "bfloat16"),  # 10 bytes
        Piece("codes", ((0, 1), (0, 3), (2, 5)), "float8_e4m3fn"),  # 9
        Piece("bias", ((4, 6),), "float32"),  # 8
    )
    message = Message.of(pieces)
    assert message.spans == ((0, 10), (16, 25), (32, 40))
    assert message.size == 40
    assert Message.of(pieces[:1]).size == 10


def test_a_header_says_all_of_a_queue():
    pieces = (
        (Piece("a.weight", ((0, 2), (4, 6)), "bfloat16"), Piece("b", ((0, 1),), "float32")),
        (Piece("experts.w13_weight", ((3, 4), (0, 8), (0, 8)), "float8_e4m3fn"),),
    )
    queue = tuple(map(Message.of, pieces))
    assert decode_header(encode_header(queue)) == queue


@given(st.lists(st.integers(1, 6 * MIB), max_size=60), st.integers(1, 8 * MIB))
def test_packing_keeps_everything_within_the_limit(sizes: list[int], bucket_bytes: int):
    numbered = list(enumerate(sizes))
    packed = pack(numbered, lambda item: item[1], bucket_bytes)
    assert sorted(item for message in packed for item in message) == numbered
    for message in packed:
        assert len(message) == 1 or sum(nbytes for _, nbytes in message) <= bucket_bytes
        assert len(message) == 1 or max(nbytes for _, nbytes in message) <= 256 << 10


@given(st.integers(0, 50), st.integers(1, 400), st.integers(1, 99), st.integers(1, 2000))
def test_rows_are_split_without_gap(start: int, count: int, row_bytes: int, limit: int):
    parts = list(split(range(start, start + count), row_bytes, limit, multiple=4))
    assert parts[0].start == start
    assert parts[-1].stop == start + count
    assert all(a.stop == b.start for a, b in pairwise(parts))
    assert all(len(part) % 4 == 0 for part in parts[:-1])
    assert all(len(part) * row_bytes <= max(limit, 4 * row_bytes) for part in parts)


@pytest.mark.parametrize(("dtype", "rows"), [("bfloat16", 100), ("float8_e4m3fn", 128)])
def test_an_expert_is_cut_alike_on_both_sides_and_codes_between_blocks(dtype: str, rows: int):
    piece = Piece("w13_weight", ((5, 6), (512, 896), (0, 10)), dtype)
    nbytes = rows * 10 * (2 if dtype == "bfloat16" else 1)
    cut = list(in_rows(Outgoing("gate_proj.weight", ((128, 512), (0, 10)), piece), nbytes))
    assert len(cut) == -(-384 // rows)
    for item, start in zip(cut, range(0, 384, rows), strict=True):
        stop = min(start + rows, 384)
        assert item.region == ((128 + start, 128 + stop), (0, 10))
        assert item.piece.region == ((5, 6), (512 + start, 512 + stop), (0, 10))


@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_no_order_of_messages_can_deadlock(senders: int, receivers: int, data: st.DataObject):
    """Every rank works through its own list; the n-th message of a pair needs both of its ranks."""
    counts = {
        (s, senders + r): data.draw(st.integers(0, 4))
        for s in range(senders)
        for r in range(receivers)
    }
    turns = Turns(senders, senders + receivers)
    waiting: dict[int, list[tuple[int, int, int]]] = {}
    for rank in range(senders + receivers):
        pairs = {pair for pair in counts if rank in pair}
        queues = {sum(pair) - rank: [(*pair, n) for n in range(counts[pair])] for pair in pairs}
        order = in_turn(queues, lambda peer, rank=rank: turns.of(*sorted((rank, peer))))
        waiting[rank] = [message for _, message in order]
    left = sum(counts.values())
    while left:
        ready = [
            queue[0]
            for rank, queue in waiting.items()
            if queue and queue[0][0] == rank and waiting[queue[0][1]][0] == queue[0]
        ]
        assert ready, waiting
        for sender, receiver, _ in ready:
            waiting[sender].pop(0)
            waiting[receiver].pop(0)
        left -= len(ready)


def test_sglangs_interpreter_needs_nothing_else_of_ours():
    script = (
        "import sys; before = set(sys.modules); import torch, xxhash; third = set(sys.modules);"
        "import r1mega.rollout.sglang_loader;"
        "print(*sorted(name for name in set(sys.modules) - third if '.' not in name or "
        "name.startswith('r1mega')))"
    )
    root = Path(__file__).parents[3]
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True
    ).stdout.split()
    ours = {name for name in found if name.startswith("r1mega")}
    assert ours == {
        "r1mega",
        "r1mega.rollout",
        "r1mega.rollout.p2p",
        "r1mega.rollout.p2p.messages",
        "r1mega.rollout.p2p.receiver",
        "r1mega.rollout.p2p.wire",
        "r1mega.rollout.sglang_loader",
        "r1mega.rollout.wire",
    }
    assert {name for name in found if name not in ours} <= sys.stdlib_module_names | {"__mp_main__"}
