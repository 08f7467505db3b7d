"""The expert ids in an engine's answer, in SGLang's form: base64 of int32 [tokens, layers, topk].

Dense layers are there too, all zero. The learner would train on wrong ids in silence, so whatever
is not exactly as the model's routers choose is refused.
"""

import base64
import binascii

import numpy as np

from r1mega.records import RoutedExperts, Routers


def read_routed_experts(text: object, num_tokens: int, routers: Routers) -> RoutedExperts:
    """``meta_info.routed_experts`` of a sample of ``num_tokens``, prompt included.

    Raises ValueError with what is wrong, to be read behind "the answer for <uid> ".
    """
    if not isinstance(text, str):
        raise ValueError(
            "has no meta_info.routed_experts: have the engine started with "
            "--enable-return-routed-experts"
        )
    try:
        numbers = np.frombuffer(base64.b64decode(text, validate=True), dtype="<i4")
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"has routed_experts that are not base64 of int32: {error}") from error
    shape = (num_tokens - 1, routers.num_layers, routers.topk)
    if numbers.size != np.prod(shape):
        raise ValueError(
            f"has {numbers.size} expert ids, but {num_tokens} tokens have {np.prod(shape)} "
            f"(tokens - 1, layers, topk = {shape}): do engine and learner hold the same model?"
        )
    ids_TMK = numbers.reshape(shape)[:, routers.num_dense_layers :]
    if ids_TMK.size and not 0 <= ids_TMK.min() <= ids_TMK.max() < routers.num_experts:
        raise ValueError(
            f"has expert ids from {ids_TMK.min()} to {ids_TMK.max()}, but the model has "
            f"{routers.num_experts} experts"
        )
    ids_TMK = ids_TMK.astype(np.dtype(routers.id_dtype).newbyteorder("<"))
    ordered = np.sort(ids_TMK, axis=-1)
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        raise ValueError("has a token with the same expert twice in one layer")
    return RoutedExperts(dtype=routers.id_dtype, ids=ids_TMK.tobytes())
