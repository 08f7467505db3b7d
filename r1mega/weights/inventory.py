"""What a folder of weights holds, and whether that is the network it is said to be.

Optional is only what a network works without: its MTP layers (all their tensors or none of them),
their copies of embedding and head, FP8 (codes with scales), rotary frequencies and the copy that a
tied head may have. Anything else that is missing, unknown or of another shape is named.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from r1mega.config import schema
from r1mega.parallel.layout import Layout
from r1mega.weights.blocks import scale_name, scale_shape, weight_name
from r1mega.weights.fp8 import CODES, SCALES
from r1mega.weights.holders import Held, holders
from r1mega.weights.names import Spec, fp8_weights, hf_shapes
from r1mega.weights.slices import WEIGHT_DTYPES, StoredTensor

_NAMED = 3  # of many names, in one sentence

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Inventory:
    """The stored tensors that count, in forward order, scales behind their weights."""

    shapes: Shapes
    mtp: bool
    quantized: frozenset[str]  # weights stored as FP8 codes

    def holders(self, model: schema.Model, layout: Layout) -> dict[str, Held]:
        """Which ranks hold what of each stored tensor under ``layout``."""
        spec = Spec(mtp=self.mtp, mtp_copies=self.mtp)
        table = holders(model, layout, spec, quantized=self.quantized)
        return {name: table[name] for name in self.shapes}


def take_inventory(
    model: schema.Model, stored: Mapping[str, StoredTensor], where: str
) -> Inventory:
    """What ``stored`` holds of ``model``; raises ValueError that begins with ``where`` and names
    tensors that are missing, unknown, mis-shaped or not of a weight's dtype, a partial MTP layer,
    codes without scales and scales without codes."""
    known = hf_shapes(model, Spec(mtp=True, mtp_copies=True))
    quantized = frozenset(name for name in known if name in stored and _is_quantized(stored[name]))
    shapes: Shapes = {}
    for name, shape in known.items():
        if name in stored:
            shapes[name] = shape
        if name in quantized:
            shapes[scale_name(name)] = scale_shape(shape)
    if problem := next(_problems(model, stored, shapes, quantized), None):
        raise ValueError(f"{where}: {problem}")
    mtp_begins = f"model.layers.{model.num_hidden_layers}."
    mtp = any(name.startswith(mtp_begins) for name in shapes)
    return Inventory(shapes, mtp, quantized)


def _problems(
    model: schema.Model,
    stored: Mapping[str, StoredTensor],
    shapes: Shapes,
    quantized: frozenset[str],
) -> Iterator[str]:
    trunk, mtp = hf_shapes(model), hf_shapes(model, Spec(mtp=True))
    if missing := [name for name in trunk if name not in stored]:
        yield f"no tensor {_some(missing)}; is this a checkpoint of another model?"
    if unknown := sorted(n for n in stored.keys() - shapes.keys() if not _is_spare(n, model)):
        yield from _unknown(unknown, model, stored)
    missing = [name for name in mtp if name not in stored]
    if missing and shapes.keys() - trunk.keys() - {scale_name(name) for name in quantized}:
        yield (
            f"the MTP layers are there in part only, without {_some(missing)}: copy the folder "
            "anew, or leave them out altogether"
        )
    for name in sorted(quantized - fp8_weights(model, Spec(mtp=True))):
        yield f"{name} is stored as {CODES}, which is no weight's of its kind: convert it anew"
    if missing := [name for name in shapes if name not in stored]:
        yield f"FP8 weights without their scales {_some(missing)}: they mean nothing; copy it anew"
    for name, shape in shapes.items():
        yield from _unlike(name, shape, stored[name], is_quantized=name in quantized)


def _unknown(
    names: list[str], model: schema.Model, stored: Mapping[str, StoredTensor]
) -> Iterator[str]:
    if scales := [name for name in names if (of := weight_name(name)) and of in stored]:
        yield f"{_some(scales)} are scales of weights that are not FP8: copy the folder anew"
    yield (
        f"a {model.architecture} model of this configuration has no {_some(names)}: it would be "
        "left out; is this a checkpoint of another model?"
    )


def _unlike(
    name: str, shape: tuple[int, ...], stored: StoredTensor, *, is_quantized: bool
) -> Iterator[str]:
    if stored.shape != shape:
        yield (
            f"{name} has shape {list(stored.shape)} but the model wants {list(shape)}: it is a "
            "checkpoint of another model"
        )
    readable = (SCALES,) if weight_name(name) else (CODES,) if is_quantized else WEIGHT_DTYPES
    if stored.dtype not in readable:
        yield (
            f"{name} is stored as {stored.dtype}, which is no weight's; readable are "
            f"{', '.join(readable)}"
        )


def _is_quantized(stored: StoredTensor) -> bool:
    return stored.dtype == CODES


def _is_spare(name: str, model: schema.Model) -> bool:
    """Follows from the rest: nothing is lost without it."""
    copied_head = model.tie_word_embeddings and name == "lm_head.weight"
    return copied_head or name.endswith("rotary_emb.inv_freq")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(repr, names[:_NAMED])) + more
