"""Does ``model.init`` hold the configured network? Judged by headers, before any process starts.

Shapes alone do not tell: another rope_theta, another number of heads of the same total width or a
bias that nobody asked for load without a word and compute something else.
"""

from collections.abc import Iterator
from pathlib import Path

from r1mega.config import schema
from r1mega.model.hf_config import hf_config
from r1mega.weights.inventory import take_inventory
from r1mega.weights.names import Spec, hf_shapes
from r1mega.weights.readers import read_network
from r1mega.weights.slices import SliceReader

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
    """Raises ValueError naming what disagrees: a key of the network, or the first tensors."""
    if not folder.is_dir():
        raise ValueError(
            f"model.init={folder} is not there: run the stage that writes it first, or correct "
            "the path"
        )
    with SliceReader(folder) as reader:
        stored = read_network(folder)
        if differing := ", ".join(_differences(stored, model)):
            raise ValueError(
                f"model.init={folder} is described as another network: {differing}; take its "
                "numbers, or correct the description where the difference is meant"
            )
        inventory = take_inventory(stored, reader.tensors, str(folder))
    if absent := next((n for n in hf_shapes(model, spec) if n not in inventory.shapes), None):
        raise ValueError(
            f"{folder}: no tensor {absent!r}: it has not the MTP layers that "
            "learner.mtp_loss_weight trains; set it to 0, or take weights that have them"
        )


def _differences(stored: schema.Model, model: schema.Model) -> Iterator[str]:
    if stored.architecture != model.architecture:
        yield f"model_type is {stored.architecture} there and {model.architecture} here"
        return
    there, here = hf_config(stored), hf_config(model)
    for key in sorted((there.keys() | here.keys()) - _FREE):
        if there.get(key) != here.get(key):
            yield f"{key} is {there.get(key)} there and {here.get(key)} here"
