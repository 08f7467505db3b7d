"""Where the tensors of a folder go: which file holds which rectangle. Pure arithmetic."""

from collections.abc import Iterable, Mapping

from r1mega.weights.checkpoints.checkpoint import shard
from r1mega.weights.holders import Held, balanced_owners
from r1mega.weights.regions import Region, extent, whole
from r1mega.weights.slices import Piece, StoredTensor
from r1mega.weights.streams import Recipe
from r1mega.weights.tensor_file import num_bytes

Shapes = dict[str, tuple[str, tuple[int, ...]]]  # dtype (safetensors' name) and shape by name


def shapes_of(made: Iterable[Recipe]) -> Shapes:
    """Of everything that is made, in order."""
    return {name: shape for recipe in made for name, shape in recipe.makes.items()}


def cut_for_ranks(shapes: Shapes, held: Mapping[str, Held]) -> dict[str, StoredTensor]:
    """Every part in the file of one of its holders, evenly; what nobody holds with rank 0."""

    def bytes_of_part(name: str, region: Region) -> int:
        return num_bytes(shapes[name][0], extent(region))

    owners = balanced_owners(held, bytes_of_part)
    targets = {}
    for name, (dtype, shape) in shapes.items():
        parts = [(whole(shape), 0)]
        if name in held:
            regions = (region for region, _ in held[name].parts)
            parts = list(zip(regions, owners[name], strict=True))
        pieces = tuple(Piece(shard("weights", rank), name, region) for region, rank in parts)
        targets[name] = StoredTensor(shape, pieces, dtype)
    return targets


def cut_by_size(shapes: Shapes, shard_bytes: int) -> dict[str, StoredTensor]:
    """Whole tensors, in files that are filled one after the other."""
    numbers: dict[str, int] = {}
    number, filled = 1, 0
    for name, (dtype, shape) in shapes.items():
        size = num_bytes(dtype, shape)
        if filled and filled + size > shard_bytes:
            number, filled = number + 1, 0
        numbers[name] = number
        filled += size
    targets = {}
    for name, (dtype, shape) in shapes.items():
        file = f"model-{numbers[name]:05d}-of-{number:05d}.safetensors"
        targets[name] = StoredTensor(shape, (Piece(file, name, whole(shape)),), dtype)
    return targets
