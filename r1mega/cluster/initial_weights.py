"""Does ``model.init`` hold the configured network? Judged by headers, before any process starts.

Shapes alone do not tell: another rope_theta, another number of heads of the same total width or a
bias that nobody asked for load without a word and compute something else.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from r1mega.config import schema
from r1mega.model.hf_config import hf_config, model_from_hf
from r1mega.weights import checkpoint
from r1mega.weights.names import Spec, hf_shapes
from r1mega.weights.slices import CHECKPOINT_INDEX, SliceReader

# Keys that change nothing of what stored weights compute; MTP layers are looked up by name.
_FREE = {
    "max_position_embeddings",
    "initializer_range",
    "eos_token_id",
    "bos_token_id",
    "num_nextn_predict_layers",
    "rope_parameters",  # once more what rope_theta and rope_scaling say
}


def check_weights(folder: Path, model: schema.Model, spec: Spec) -> None:
    """Raises ValueError naming what disagrees: a key of the network, or the first tensor."""
    if not folder.is_dir():
        raise ValueError(
            f"model.init={folder} is not there: run the stage that writes it first, or correct "
            "the path"
        )
    with SliceReader(folder) as reader:
        stored = _stored_network(folder, model)
        if differing := ", ".join(_differences(stored, model)):
            raise ValueError(
                f"model.init={folder} is described as another network: {differing}; take its "
                "numbers, or correct the description where the difference is meant"
            )
        wanted = hf_shapes(model, spec)
        for name, shape in wanted.items():
            reader.check(name, shape)
        if unread := next(_unread(reader.tensors.keys() - wanted.keys(), stored), None):
            raise ValueError(
                f"{folder}: a {model.architecture} model of this configuration has no {unread!r}: "
                "it would be left out; is this a checkpoint of another model?"
            )


def _stored_network(folder: Path, model: schema.Model) -> schema.Model:
    if (folder / CHECKPOINT_INDEX).exists():
        return checkpoint.read_network(folder)
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text())
        # Chat models name several ends of a response; the configuration says which one is used.
        return model_from_hf({**values, "eos_token_id": model.eos_token_id})
    except FileNotFoundError:
        raise ValueError(f"{folder} has no config.json: copy the folder as a whole") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _differences(stored: schema.Model, model: schema.Model) -> Iterator[str]:
    if stored.architecture != model.architecture:
        yield f"model_type is {stored.architecture} there and {model.architecture} here"
        return
    there, here = hf_config(stored), hf_config(model)
    for key in sorted((there.keys() | here.keys()) - _FREE):
        if there.get(key) != here.get(key):
            yield f"{key} is {there.get(key)} there and {here.get(key)} here"


def _unread(names: Iterable[str], stored: schema.Model) -> Iterator[str]:
    """Tensors that belong to no part which may be left out: MTP layers, a tied head's copy."""
    first = stored.num_hidden_layers
    mtp = tuple(f"model.layers.{first + i}." for i in range(stored.num_nextn_predict_layers))
    for name in sorted(names):
        head = stored.tie_word_embeddings and name == "lm_head.weight"
        if not (head or name.startswith(mtp) or name.endswith("rotary_emb.inv_freq")):
            yield name
