"""What SGLang calls on each rank of an engine to receive weights point to point.

``--custom-weight-loader r1mega.rollout.sglang_loader.load`` and update_weights_from_tensor with one
empty tensor, named by the invitation (``p2p.invite``). Runs in SGLang's interpreter: imports torch,
xxhash and the standard library only.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from r1mega.rollout.p2p.receiver import Invitation, ReceiveFailed, receive

log = logging.getLogger(__name__)


@torch.no_grad()
def load(model: nn.Module, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Receive this rank's slices into ``model``'s parameters.

    A transfer that fails is no exception here: SGLang 0.5.23 would end the server. Learner rank 0
    learns of it over the group and does not raise the version.
    """
    ((invitation, _),) = named_tensors
    try:
        receive(dict(model.named_parameters()), Invitation.decode(invitation))
    except ReceiveFailed as error:
        log.error("weights did not arrive whole: %s", error)
        return
    # MLA's absorbed w_kc and w_vc are made of kv_b_proj (models/deepseek_common, 0.5.23); ending
    # the session does it only where no weights were loaded.
    if (finish := getattr(model, "post_load_weights", None)) is not None:
        finish()
