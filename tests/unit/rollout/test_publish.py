"""The pure parts of publishing: buckets, the mark of the last one, the choice to check."""

import hashlib
import struct

import torch

from r1mega.rollout import publish
from r1mega.rollout.wire import digest


def test_buckets_keep_order_and_size() -> None:
    tensors = [(str(i), torch.zeros(size)) for i, size in enumerate([10, 10, 30, 5, 5, 5])]
    buckets = list(publish._buckets(tensors, 80))
    assert [[name for name, _ in bucket] for bucket in buckets] == [
        ["0", "1"],
        ["2"],  # larger than a bucket: alone
        ["3", "4", "5"],
    ]


def test_only_the_last_is_marked() -> None:
    buckets = [[("a", torch.zeros(1))], [("b", torch.zeros(1))], [("c", torch.zeros(1))]]
    marks = [last for _, last in publish._with_last_marked(iter(buckets))]
    assert marks == [False, False, True]
    assert list(publish._with_last_marked(iter([]))) == []


def test_digest_is_of_float32_values() -> None:
    expected = hashlib.sha256(struct.pack("<3f", 1.0, 2.0, 3.5)).hexdigest()
    assert digest(torch.tensor([1.0, 2.0, 3.5])) == expected
    assert digest(torch.tensor([1.0, 2.0, 3.5], dtype=torch.bfloat16)) == expected
    assert digest(torch.tensor([[1.0, 9.0], [2.0, 9.0], [3.5, 9.0]])[:, 0]) == expected


def test_every_tensor_is_checked_in_time() -> None:
    names = [f"model.layers.{index}.weight" for index in range(100)]
    chosen = [{n for n in names if publish._is_checked(n, version)} for version in range(100)]
    assert set().union(*chosen) == set(names)
    assert 5 < sum(map(len, chosen)) / 100 < 20
    assert chosen[0] != chosen[1]
