"""Between Hugging Face folders and checkpoints of ours, in both directions, by copying bands.

Both hold the same tensors under the same names, cut into other pieces. So a conversion says where
each tensor goes and has ``copying`` carry it there: memory stays within a few bands, a kill costs
the tensors under way, and what comes out has been read back. Until all of it has, it is in
``.NAME.partial``; one rename makes it ``NAME``.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path

from r1mega import __version__
from r1mega.config import network_checks, schema
from r1mega.config.derived import even_stages
from r1mega.parallel.layout import Layout
from r1mega.system.files import sync_folder, write_atomically
from r1mega.weights.checkpoint import COMPANIONS, STATE, Progress, State, shard
from r1mega.weights.copying import JOURNAL, copy
from r1mega.weights.hf_folder import (
    CONFIG,
    matching_config,
    read_companions,
    shard_index,
)
from r1mega.weights.holders import Held, balanced_owners, ranks_for
from r1mega.weights.inventory import Inventory, take_inventory
from r1mega.weights.manifest import commit, partial_folder, read_manifest, record_bytes, verify_file
from r1mega.weights.names import Spec, fp8_weights
from r1mega.weights.progress import Listener
from r1mega.weights.readers import Reader, check_folder, read_network
from r1mega.weights.slices import (
    CHECKPOINT_INDEX,
    HF_INDEX,
    Piece,
    SliceReader,
    StoredTensor,
    checkpoint_index,
)
from r1mega.weights.streams import Precision, Recipe, recipes
from r1mega.weights.tensor_file import DTYPES, extent, whole

GIGABYTE = 1_000_000_000


def hf_to_megatron(
    folder: Path,
    out: Path,
    listener: Listener,
    *,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    etp: int = 1,
) -> None:
    """Write the weights in ``folder`` as a checkpoint cut for a layout, ``out``.

    The layout is that of the smallest world with these axes, its layers spread as evenly as can be;
    learners of any layout can start from it. Tensors keep their dtypes. Raises ValueError when
    ``folder`` is not whole or not of one network, when the network cannot be cut so, and when
    ``out`` cannot be finished.
    """
    model, companions = _surroundings(folder)
    with SliceReader(folder) as source:
        layout = smallest_layout(model, tp=tp, pp=pp, ep=ep, etp=etp)
        write_checkpoint(source, model, layout, out, companions, listener)


def megatron_to_hf(
    folder: Path,
    out: Path,
    listener: Listener,
    *,
    dtype: Precision = "keep",
    shard_bytes: int = 5 * GIGABYTE,
) -> None:
    """Write the weights of the checkpoint ``folder`` as a Hugging Face folder ``out``.

    ``dtype``: keep, as they are; bf16 or fp8, as DeepSeek publishes them. Raises as
    ``hf_to_megatron``.
    """
    model, companions = _surroundings(folder)
    with SliceReader(folder) as source:
        write_hf(source, model, out, companions, listener, dtype=dtype, shard_bytes=shard_bytes)


def smallest_layout(model: schema.Model, *, tp: int, pp: int, ep: int, etp: int) -> Layout:
    """Without replicas to spare; raises ValueError when the network cannot be cut so."""
    parallel = schema.Parallel(tp=tp, pp=pp, ep=ep, etp=etp)
    if wrong := list(network_checks.network_violations(model, parallel, schema.Learner())):
        raise ValueError("; ".join(wrong))
    first, last = even_stages(model.num_hidden_layers, pp)
    return Layout(
        world=ranks_for(tp=tp, pp=pp, ep=ep, etp=etp),
        tp=tp,
        pp=pp,
        ep=ep,
        etp=etp,
        layers_in_first_stage=first,
        layers_in_last_stage=last,
    )


def write_checkpoint(
    source: Reader,
    model: schema.Model,
    layout: Layout,
    out: Path,
    companions: Mapping[str, bytes],
    listener: Listener,
) -> None:
    """``source``, which holds ``model``, as a checkpoint with ``companions`` in its folder hf."""
    inventory = take_inventory(model, source.tensors, str(source.folder))
    made = recipes(_in_order(source, inventory), "keep", weights=(), fp8_weights=())
    targets = _cut_for_ranks(_shapes(made), inventory.holders(model, layout))
    with _made(out) as partial:
        copied = copy(source, made, targets, partial, listener)
        state = State(
            progress=Progress(step=0, data_position=0),
            layout=layout,
            spec=Spec(mtp=inventory.mtp),
            model=model,
            code=__version__,
        )
        texts = {f"{COMPANIONS}/{name}": content for name, content in companions.items()}
        texts[CHECKPOINT_INDEX] = checkpoint_index(copied.tensors).encode()
        texts[STATE] = state.text().encode()
        _write_texts(partial, texts)
        files = copied.files | {name: record_bytes(content) for name, content in texts.items()}
        (partial / JOURNAL).unlink()
        commit(partial, out, files)


def write_hf(
    source: Reader,
    model: schema.Model,
    out: Path,
    companions: Mapping[str, bytes],
    listener: Listener,
    *,
    dtype: Precision,
    shard_bytes: int,
) -> None:
    """``source``, which holds ``model``, as a Hugging Face folder."""
    inventory = take_inventory(model, source.tensors, str(source.folder))
    if CONFIG not in companions:
        raise ValueError(f"{source.folder} came without {CONFIG}: put that of its model there")
    made = recipes(
        _in_order(source, inventory),
        dtype,
        weights=inventory.shapes.keys(),
        fp8_weights=fp8_weights(model, Spec(mtp=inventory.mtp)),
    )
    targets = _cut_by_size(_shapes(made), shard_bytes)
    with _made(out) as partial:
        copied = copy(source, made, targets, partial, listener)
        total = sum(_num_bytes(stored.dtype, stored.shape) for stored in copied.tensors.values())
        texts = dict(companions)
        texts[CONFIG] = matching_config(companions[CONFIG], copied.tensors)
        texts[HF_INDEX] = shard_index(copied.tensors, total)
        _write_texts(partial, texts)
        (partial / JOURNAL).unlink()
        sync_folder(partial)
        partial.rename(out)
        sync_folder(out.parent)


def _surroundings(folder: Path) -> tuple[schema.Model, dict[str, bytes]]:
    """The network in ``folder`` and its files that are no weights."""
    check_folder(folder)
    model = read_network(folder)
    if not (folder / CHECKPOINT_INDEX).exists():
        return model, read_companions(folder)
    for name, record in read_manifest(folder).items():
        if not name.endswith(".safetensors"):  # those have a digest for every piece
            verify_file(folder / name, record)
    return model, read_companions(folder / COMPANIONS)


def _in_order(source: Reader, inventory: Inventory) -> dict[str, StoredTensor]:
    """Everything in ``source``: forward order, then what the network does not need."""
    return {name: source.tensors[name] for name in inventory.shapes} | dict(source.tensors)


_Shapes = dict[str, tuple[str, tuple[int, ...]]]  # dtype (safetensors' name) and shape by name


def _shapes(made: Sequence[Recipe]) -> _Shapes:
    return {name: shape for recipe in made for name, shape in recipe.makes.items()}


def _cut_for_ranks(shapes: _Shapes, held: Mapping[str, Held]) -> dict[str, StoredTensor]:
    """Every part with one of its holders, what nobody holds with the first rank."""
    owners = balanced_owners(held, lambda name, region: _num_bytes(shapes[name][0], extent(region)))
    targets = {}
    for name, (dtype, shape) in shapes.items():
        parts = [(whole(shape), 0)]
        if name in held:
            regions = (region for region, _ in held[name].parts)
            parts = list(zip(regions, owners[name], strict=True))
        pieces = tuple(Piece(shard("weights", rank), name, region) for region, rank in parts)
        targets[name] = StoredTensor(shape, pieces, dtype)
    return targets


def _cut_by_size(shapes: _Shapes, shard_bytes: int) -> dict[str, StoredTensor]:
    """Whole tensors, in files that are filled one after the other."""
    numbers: dict[str, int] = {}
    number, filled = 1, 0
    for name, (dtype, shape) in shapes.items():
        size = _num_bytes(dtype, shape)
        if filled and filled + size > shard_bytes:
            number, filled = number + 1, 0
        numbers[name] = number
        filled += size
    return {
        name: StoredTensor(
            shape,
            (Piece(f"model-{numbers[name]:05d}-of-{number:05d}.safetensors", name, whole(shape)),),
            dtype,
        )
        for name, (dtype, shape) in shapes.items()
    }


def _num_bytes(dtype: str, shape: Sequence[int]) -> int:
    return prod(shape) * DTYPES[dtype].itemsize


def _write_texts(folder: Path, texts: Mapping[str, bytes]) -> None:
    for name, content in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_atomically(folder / name, content)


@contextmanager
def _made(out: Path) -> Iterator[Path]:
    """Where ``out`` is made. What fails leaves that for the next run, and no ``out``."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there and not empty: name another folder or remove it")
    partial = partial_folder(out)
    try:
        yield partial
    except OSError as error:
        raise ValueError(
            f"{out} was not finished: {error.strerror or error}; the same command goes on from "
            f"{partial}"
        ) from error
