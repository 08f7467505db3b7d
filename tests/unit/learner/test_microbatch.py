"""The parts of a microbatch on context-parallel ranks, put together, are the microbatch."""

import pytest
import torch

from r1mega.learner.microbatch import Microbatch, common_tokens, make_microbatch
from r1mega.records import Sequence

CPU = torch.device("cpu")


def sequence(uid: str, length: int, start: int) -> Sequence:
    tokens = tuple(range(10 * length, 11 * length))
    return Sequence(uid=uid, token_ids=tokens, start=start, weight=1 / length)


SEQUENCES = (sequence("a", 7, 1), sequence("b", 3, 2), sequence("c", 12, 5))


def parts(cp: int) -> list[Microbatch]:
    ids = [torch.full((len(s.token_ids) - 1, 2, 1), i) for i, s in enumerate(SEQUENCES)]
    return [
        make_microbatch(
            SEQUENCES, [0, 1, 2], multiple=2, device=CPU, cp=cp, cp_rank=rank, expert_ids=ids
        )
        for rank in range(cp)
    ]


def facts(microbatch: Microbatch) -> tuple[set[tuple[int, ...]], dict[int, tuple[int, ...]]]:
    """Real tokens with position and replayed expert, and place of a target row to what it reads."""
    ids_T = microbatch.packed.expert_ids_TMK[:, 0, 0]
    columns = (microbatch.tokens_T, microbatch.positions_T, ids_T)
    tokens = list(zip(*(c.tolist() for c in columns), strict=True))
    padding = microbatch.packed.padding_T.tolist()
    real = {token for token, pad in zip(tokens, padding, strict=True) if not pad}
    targets = zip(
        microbatch.targets.places_L.tolist(),
        microbatch.tokens_T[microbatch.targets.rows_L].tolist(),
        microbatch.targets.ids_L.tolist(),
        strict=True,
    )
    return real, {place: (token, target) for place, token, target in targets}


@pytest.mark.parametrize("cp", [2, 3, 4])
def test_parts_hold_every_token_and_every_target_once(cp: int) -> None:
    real, targets = facts(parts(1)[0])
    assert len(real) == 22
    assert len(targets) == 6 + 1 + 7
    assert all(target == token + 1 for token, target in targets.values())
    held = [facts(part) for part in parts(cp)]
    assert sum(len(tokens) for tokens, _ in held) == len(real)
    assert set().union(*(tokens for tokens, _ in held)) == real
    assert sum(len(rows) for _, rows in held) == len(targets)
    assert {k: v for _, rows in held for k, v in rows.items()} == targets


@pytest.mark.parametrize("cp", [2, 3])
def test_losses_see_the_same_columns_on_every_part(cp: int) -> None:
    whole = parts(1)[0]
    for part in parts(cp):
        assert torch.equal(part.weight_R, whole.weight_R)
        assert torch.equal(part.sequence_R, whole.sequence_R)
        assert part.targets.num_rows == len(part.weight_R) == 14
        assert len(part.tokens_T) * cp == int(part.packed.cu_seqlens_q[-1])


def test_ranks_that_share_experts_agree_on_the_length() -> None:
    ranks = [[[0, 1], []], [[2], [0]]]  # [rank][microbatch]
    tokens = common_tokens(SEQUENCES, ranks, cp=2, multiple=1)
    assert tokens == [12, 8]
    for rank in ranks:
        for indices, least in zip(rank, tokens, strict=True):
            part = make_microbatch(
                SEQUENCES, indices, multiple=1, device=CPU, cp=2, least_tokens=least
            )
            assert len(part.tokens_T) == least // 2
