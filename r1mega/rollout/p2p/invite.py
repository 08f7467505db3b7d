"""How an engine is asked to take part in a transfer. The call answers when all has arrived.

SGLang has one door for a function of ours, --custom-weight-loader, and one route to it, which takes
a pickle: it is reached on loopback or a private network only, and what we pickle is one empty
tensor, whose name is the invitation.
"""

import base64
import pickle
from collections.abc import Callable, Sequence

import torch

from r1mega.rollout import control
from r1mega.rollout.fleet import EngineHandle
from r1mega.rollout.p2p.receiver import Invitation

LOADER = "r1mega.rollout.sglang_loader.load"  # --custom-weight-loader

# (engine, an invitation for each of its ranks, timeout in s); raises control.CallFailed
Invite = Callable[[EngineHandle, Sequence[Invitation], float], object]


def invite_embedded(
    engine: EngineHandle, invitations: Sequence[Invitation], timeout_s: float
) -> object:
    (invitation,) = invitations
    body = {"invitation": invitation.encode()}
    return control.post(f"{engine.url}/update_weights_from_peers", body, timeout_s=timeout_s)


def invite_sglang(
    engine: EngineHandle, invitations: Sequence[Invitation], timeout_s: float
) -> object:
    body = {
        "serialized_named_tensors": [_pickled(invitation) for invitation in invitations],
        "load_format": LOADER,
        "flush_cache": True,
    }
    return control.post(f"{engine.url}/update_weights_from_tensor", body, timeout_s=timeout_s)


def _pickled(invitation: Invitation) -> str:
    named = [(invitation.encode(), torch.empty(0))]
    return base64.b64encode(pickle.dumps(named, protocol=4)).decode()
