"""Tokens, log-prob bits and experts of a request depend on its seed and the weights alone.

Random crowds: who else is there and when, how many slots, how prompts are cut and shared, pauses
that keep or give up the cache, requests that are aborted beside it.
"""

import random
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from r1mega.rollout.engine.requests import Completion
from r1mega.rollout.engine.scheduler import Scheduler
from tests.unit.rollout.engine.tools import DEEPSEEK, MODELS

CROWDS_PER_MODEL = 6
QUICK = 1  # of them; the others are slow

Run = tuple[tuple[int, ...], dict[str, Any]]


def _random_prompt(chance: random.Random) -> tuple[int, ...]:
    length = chance.choice([1, 2, 15, 16, 17, 31, 32, 33, 64, 65, chance.randint(3, 180)])
    return tuple(chance.randrange(3, 64) for _ in range(length))


def _random_run(chance: random.Random, prompt: tuple[int, ...], experts_from: int | None) -> Run:
    return prompt, {
        "seed": chance.getrandbits(63),
        "temperature": chance.choice([1.0, 0.7, 0.0]),
        "top_p": chance.choice([1.0, 0.9]),
        "top_k": chance.choice([-1, 20]),
        "min_p": chance.choice([0.0, 0.05]),
        "max_new_tokens": chance.randint(1, 50),
        "stop_token_ids": frozenset(chance.sample(range(64), chance.choice([0, 1]))),
        "experts_from": experts_from,
    }


def _bits(future: "Future[Completion]") -> tuple[Any, ...]:
    completion = future.result(0)
    return completion.token_ids, completion.logprobs, completion.finish, completion.experts


def _pause(scheduler: Scheduler, chance: random.Random) -> None:
    scheduler.pause(chance.choice(["in_place", "retract"]))
    if chance.random() < 0.5:
        scheduler.flush_cache()
    scheduler.resume()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "number",
    [pytest.param(i, marks=[pytest.mark.slow] * (i >= QUICK)) for i in range(CROWDS_PER_MODEL)],
)
def test_a_request_in_a_crowd_equals_itself_alone(
    saved: Callable,
    scheduler_of: Callable,
    submit: Callable,
    run_all: Callable,
    kind: str,
    number: int,
):
    chance = random.Random(f"{kind} {number}")
    own = saved(kind)
    experts_from = 0 if kind in DEEPSEEK else None
    prompts = [_random_prompt(chance) for _ in range(4)]
    runs = [_random_run(chance, prompt, experts_from) for prompt in prompts for _ in range(3)]
    records = {"records_experts": experts_from is not None}

    alone = scheduler_of(own, num_slots=1, prefill_tokens=256, reuse_prefixes=False, **records)
    expected = []
    for prompt, fields in runs:
        expected.append(submit(alone, prompt, **fields))
        run_all(alone)

    crowd = scheduler_of(
        own,
        num_slots=chance.randint(2, 24),
        prefill_tokens=chance.randint(1, 90),
        reuse_prefixes=chance.random() < 0.7,
        **records,
    )
    futures: dict[int, Future[Completion]] = {}
    with torch.inference_mode():
        for index in chance.sample(range(len(runs)), len(runs)):
            prompt, fields = runs[index]
            futures[index] = submit(crowd, prompt, **fields)
            for stranger in range(chance.randint(0, 2)):
                rid = f"{index} {stranger}"
                submit(crowd, _random_prompt(chance), seed=chance.getrandbits(63), rid=rid)
            for _ in range(chance.choice([0, 0, 1, 5])):
                crowd.step()
            if chance.random() < 0.2:
                _pause(crowd, chance)
            if chance.random() < 0.3:
                crowd.abort(f"{index} 0")
    run_all(crowd)
    for index, future in enumerate(expected):
        assert _bits(futures[index]) == _bits(future), runs[index]
