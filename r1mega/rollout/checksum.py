"""SGLang 0.5.23's checksums of parameters: what its /weights_checker says of a tensor's bytes."""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from r1mega.weights.tensor_file import bytes_of, octets

Checksum = Callable[[Tensor], str]

_WORD = 0xFFFFFFFF
_TILE = 8192  # words of 32 bits
_TILES_AT_ONCE = 512  # bounds our memory
_SEED = 0x243F6A88
# Of each of the two mixed 32-bit halves: seed, multiplier and rotation of a word's position.
_HALVES = (
    (_SEED, 0x27D4EB2D, 15),
    ((_SEED * 0x9E3779B1 ^ 0xDEADBEEF) & _WORD, 0x165667B1, 13),
)


def cpu_checksum(values: Tensor) -> str:
    """On a CPU: the first 16 hex digits of the SHA-256 of the row-major bytes
    (managers/mm_utils.py, ``tensor_hash``)."""
    return hashlib.sha256(bytes_of(values.cpu())).hexdigest()[:16]


def cuda_checksum(values: Tensor) -> str:
    """On a GPU: ``kernels/ops/memory/gpu_tensor_hash.py``, computed wherever ``values`` are.

    Words of 32 bits are mixed with their positions by murmur3's finaliser, added up in tiles, and
    the finalised sums of the tiles are added up once more.
    """
    data = octets(values)
    words = pad(data, (0, -data.numel() % 4)).view(torch.int32)
    if not words.numel():
        return f"{0:016x}"
    step = _TILE * _TILES_AT_ONCE
    sums = [_tile_sum(words, start, step) for start in range(0, words.numel(), step)]
    return f"{_splitmix64(sum(sums)):016x}"


def _tile_sum(words: Tensor, start: int, length: int) -> int:
    """The sum of the hashes of the tiles in ``words[start : start + length]``."""
    part = words[start : start + length].long() & _WORD
    position = torch.arange(start, start + len(part), device=words.device) & _WORD
    total = 0
    for (seed, multiplier, turn), shift in zip(_HALVES, (32, 0), strict=True):
        rotated = (position << turn | position >> 32 - turn) & _WORD
        mixed = _finalise(part ^ (position * multiplier + seed & _WORD) ^ rotated)
        tiles = pad(mixed, (0, -len(part) % _TILE)).view(-1, _TILE).sum(1)
        hashes = _finalise((tiles ^ 4 * words.numel()) & _WORD)
        total += int(hashes.sum()) << shift
    return total


def _finalise(x: Tensor) -> Tensor:
    """murmur3's fmix32."""
    x = _times(x ^ x >> 16, 0x85EBCA6B)
    x = _times(x ^ x >> 13, 0xC2B2AE35)
    return x ^ x >> 16


def _times(x: Tensor, factor: int) -> Tensor:
    """Modulo 2^32, and never beyond 63 bits."""
    return (x * (factor & 0xFFFF) + ((x * (factor >> 16) & 0xFFFF) << 16)) & _WORD


def _splitmix64(x: int) -> int:
    mask = (1 << 64) - 1
    x &= mask
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
    return x ^ x >> 31
