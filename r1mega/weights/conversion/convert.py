"""Between Hugging Face folders and checkpoints of ours, in both directions, by copying bands.

Both hold the same tensors under the same names, cut into other pieces. So a conversion says where
each tensor goes and has ``copying`` carry it there: memory stays within a few bands, a kill costs
the tensors under way, and what comes out has been read back. Until all of it has, it is in
``.NAME.partial``; one rename makes it ``NAME``.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from r1mega import __version__
from r1mega.config import network_checks, schema
from r1mega.config.derived import even_stages
from r1mega.parallel.layout import Layout
from r1mega.system.files import sync_folder, write_files
from r1mega.weights.checkpoints.checkpoint import COMPANIONS, STATE, Progress, State
from r1mega.weights.checkpoints.manifest import (
    commit,
    partial_folder,
    read_manifest,
    record_bytes,
    verify_file,
)
from r1mega.weights.conversion.copying import JOURNAL, copy
from r1mega.weights.conversion.hf_folder import (
    CONFIG,
    matching_config,
    read_companions,
    shard_index,
)
from r1mega.weights.conversion.journal import Journal
from r1mega.weights.conversion.placing import cut_by_size, cut_for_ranks, shapes_of
from r1mega.weights.holders import ranks_for
from r1mega.weights.inventory import Inventory, take_inventory
from r1mega.weights.names import Spec, fp8_weights
from r1mega.weights.progress import Listener
from r1mega.weights.readers import Reader, check_outside, read_network
from r1mega.weights.slices import (
    CHECKPOINT_INDEX,
    HF_INDEX,
    SliceReader,
    StoredTensor,
    checkpoint_index,
)
from r1mega.weights.streams import Precision, recipes

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
    targets = cut_for_ranks(shapes_of(made), inventory.holders(model, layout))
    out = out.resolve()  # a link is written through, not replaced
    with _made(out, source.folder) as (partial, journal):
        copied = copy(source, made, targets, partial, journal, listener)
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
        write_files(partial, texts)
        files = copied.files | {name: record_bytes(content) for name, content in texts.items()}
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
    targets = cut_by_size(shapes_of(made), shard_bytes)
    out = out.resolve()  # a link is written through, not replaced
    with _made(out, source.folder) as (partial, journal):
        copied = copy(source, made, targets, partial, journal, listener)
        texts = dict(companions)
        texts[CONFIG] = matching_config(companions[CONFIG], copied.tensors)
        texts[HF_INDEX] = shard_index(copied.tensors)
        write_files(partial, texts)
        sync_folder(partial)
        partial.rename(out)
        sync_folder(out.parent)


def _surroundings(folder: Path) -> tuple[schema.Model, dict[str, bytes]]:
    """The network in ``folder`` and its files that are no weights."""
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


@contextmanager
def _made(out: Path, source: Path) -> Iterator[tuple[Path, Journal]]:
    """Where ``out`` is made, ours alone until it has its name. What fails leaves that for the next
    run, and no ``out``."""
    check_outside(out, source)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there and not empty: name another folder or remove it")
    partial = partial_folder(out)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with Journal(partial / JOURNAL) as journal:
            yield partial, journal
            (out / JOURNAL).unlink()
    except OSError as error:
        raise ValueError(
            f"{out} was not finished: {error}; the same command goes on from {partial}"
        ) from error
