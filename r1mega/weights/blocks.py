"""Arithmetic of the blocks of 128 x 128 weights that share one FP8 scale; imports no torch.

Published FP8 checkpoints keep the scales of ``NAME`` as ``NAME_scale_inv``: a row for every 128
rows and a column for every 128 columns, the last ones for what remains.
"""

from r1mega.weights.regions import Region

BLOCK = 128
_SUFFIX = "_scale_inv"


def scale_name(name: str) -> str:
    """The tensor with the scales of weight ``name``."""
    return name + _SUFFIX


def weight_name(name: str) -> str | None:
    """The weight whose scales tensor ``name`` holds, or None."""
    return name.removesuffix(_SUFFIX) if name.endswith(_SUFFIX) else None


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the scales of a weight of ``shape``; the last blocks may be smaller ones."""
    return tuple(-(-size // BLOCK) for size in shape)


def scale_region(region: Region) -> Region:
    """The scales that a region of a weight needs."""
    return tuple((start // BLOCK, -(-stop // BLOCK)) for start, stop in region)


def own_scale_region(region: Region) -> Region:
    """The scales whose blocks begin in a region of a weight: regions that partition a weight
    partition its scales so. It may be empty."""
    return tuple((-(-start // BLOCK), -(-stop // BLOCK)) for start, stop in region)
