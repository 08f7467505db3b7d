"""What requests get from the scheduler, in any mix, under pauses, aborts and new weights."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from r1mega.rollout.engine.weights import load_folder

PROMPTS = {
    length: [(7 * length + 5 * j) % 60 + 3 for j in range(length)] for length in range(1, 200)
}


@pytest.mark.parametrize(
    ("kind", "temperature"), [("yarn", 1.0), ("yarn", 0.7), ("qwen2", 1.0), ("llama", 0.7)]
)
def test_logprobs_equal_transformers(
    saved: Callable,
    scheduler_of: Callable,
    submit: Callable,
    run_all: Callable,
    kind: str,
    temperature: float,
):
    own = saved(kind)
    scheduler = scheduler_of(own)
    lengths = (1, 5, 63, 64, 65, 130, 190)
    futures = [
        submit(
            scheduler, PROMPTS[n], seed=n, temperature=temperature, top_p=0.95, max_new_tokens=40
        )
        for n in lengths
    ]
    run_all(scheduler)
    for length, future in zip(lengths, futures, strict=True):
        completion = future.result(0)
        assert len(completion.token_ids) == 40
        expected = own.response_logprobs(PROMPTS[length], completion.token_ids, temperature)
        measured = torch.tensor(completion.logprobs, dtype=torch.float64)
        torch.testing.assert_close(measured, expected, rtol=0, atol=1e-5)


def test_seeds_choose_the_tokens(
    saved: Callable, scheduler_of: Callable, submit: Callable, run_all: Callable
):
    scheduler = scheduler_of(saved("yarn"))
    futures = [submit(scheduler, PROMPTS[9], seed=seed) for seed in (1, 1, 2, 2**63 - 1, -(2**63))]
    run_all(scheduler)
    tokens = [future.result(0).token_ids for future in futures]
    assert tokens[0] == tokens[1]
    assert len(set(tokens)) == 4


def test_a_partial_response_continues_the_same_stream(
    saved: Callable, scheduler_of: Callable, submit: Callable, run_all: Callable
):
    scheduler = scheduler_of(saved("yarn"))
    whole = submit(scheduler, PROMPTS[20], seed=3, max_new_tokens=30)
    run_all(scheduler)
    first = whole.result(0).token_ids[:11]
    rest = submit(scheduler, [*PROMPTS[20], *first], seed=3, max_new_tokens=19)
    run_all(scheduler)
    assert first + rest.result(0).token_ids == whole.result(0).token_ids
    assert rest.result(0).logprobs == whole.result(0).logprobs[11:]


def test_equal_prompts_are_computed_once(
    saved: Callable, scheduler_of: Callable, submit: Callable, run_all: Callable
):
    scheduler = scheduler_of(saved("yarn"), prefill_tokens=16)
    futures = [submit(scheduler, PROMPTS[40], seed=i) for i in range(8)]
    run_all(scheduler)
    assert sorted(f.result(0).cached_tokens for f in futures) == [0] + [39] * 7
    assert scheduler.flush_cache()
    again = submit(scheduler, PROMPTS[40])
    run_all(scheduler)
    assert again.result(0).cached_tokens == 0


def test_experts_are_those_of_transformers_also_behind_a_kept_prompt(
    saved: Callable, scheduler_of: Callable, submit: Callable, run_all: Callable
):
    own = saved("yarn")
    scheduler = scheduler_of(own, num_slots=6, prefill_tokens=50, records_experts=True)
    futures = [
        submit(
            scheduler, PROMPTS[n], seed=seed, max_new_tokens=10 + 9 * seed, experts_from=7 * seed
        )
        for n in (70, 35)
        for seed in range(4)
    ]
    others = submit(scheduler, PROMPTS[20])
    run_all(scheduler)
    assert others.result(0).experts is None
    for future in futures:
        completion = future.result(0)
        prompt, first = completion.asked.prompt, completion.asked.experts_from
        assert completion.cached_tokens == (len(prompt) - 1 if completion.asked.seed else 0)
        expected = own.experts([*prompt, *completion.token_ids])[first:]
        measured = np.frombuffer(completion.experts, dtype=np.int32).reshape(expected.shape)
        np.testing.assert_array_equal(np.sort(measured), expected.sort().values)


def test_prefixes_beyond_the_memory_limit_are_forgotten_oldest_first(
    saved: Callable, scheduler_of: Callable, submit: Callable, run_all: Callable
):
    scheduler = scheduler_of(saved("yarn"))  # 1 MiB: 384 bytes a token
    for length in range(150, 190):
        submit(scheduler, PROMPTS[length], max_new_tokens=1)
    run_all(scheduler)
    oldest, newest = (submit(scheduler, PROMPTS[n], max_new_tokens=1) for n in (150, 189))
    run_all(scheduler)
    assert oldest.result(0).cached_tokens == 0
    assert newest.result(0).cached_tokens == 188


def test_stop_tokens_and_their_suppression(
    saved: Callable, scheduler_of: Callable, submit: Callable, run_all: Callable
):
    scheduler = scheduler_of(saved("yarn"))
    free = submit(scheduler, PROMPTS[9], seed=1, max_new_tokens=20)
    run_all(scheduler)
    tokens = free.result(0).token_ids
    stop = next(token for token in tokens[5:] if token not in tokens[:5])
    end = tokens.index(stop) + 1
    stopped = submit(scheduler, PROMPTS[9], seed=1, stop_token_ids=frozenset([stop, 63]))
    late = submit(
        scheduler,
        PROMPTS[9],
        seed=1,
        stop_token_ids=frozenset([stop]),
        min_new_tokens=15,
        max_new_tokens=20,
    )
    run_all(scheduler)
    assert stopped.result(0).token_ids == tokens[:end]
    assert stopped.result(0).finish.kind == "stop"
    assert stopped.result(0).finish.matched == stop
    assert stop not in late.result(0).token_ids[:15]
    assert free.result(0).finish.kind == "length"


def test_abort_keeps_what_was_drawn(
    saved: Callable, scheduler_of: Callable, submit: Callable, run_all: Callable
):
    scheduler = scheduler_of(saved("yarn"), num_slots=2)
    whole = submit(scheduler, PROMPTS[9], seed=4, max_new_tokens=50)
    run_all(scheduler)
    futures = [
        submit(scheduler, PROMPTS[9], seed=4, max_new_tokens=50, rid=f"r{i}") for i in range(3)
    ]
    with torch.inference_mode():
        for _ in range(12):
            scheduler.step()
    assert scheduler.abort("nobody") == 0
    assert scheduler.abort("r1") == 1
    partial = futures[1].result(0)
    assert partial.finish.kind == "abort"
    assert 0 < len(partial.token_ids) == len(partial.logprobs) < 50
    assert partial.token_ids == whole.result(0).token_ids[: len(partial.token_ids)]
    assert scheduler.abort(None) == 2
    assert futures[2].result(0).token_ids == ()
    assert scheduler.idle
    again = submit(scheduler, PROMPTS[9], seed=4, max_new_tokens=50)
    run_all(scheduler)
    assert again.result(0).token_ids == whole.result(0).token_ids


def test_retract_update_continue_labels_every_token_with_its_weights(
    saved: Callable, scheduler_of: Callable, submit: Callable, run_all: Callable
):
    old, new = saved("yarn"), saved("yarn", 1)
    scheduler = scheduler_of(old, num_slots=3)
    futures = [submit(scheduler, PROMPTS[n], seed=n, max_new_tokens=60) for n in (5, 70, 30, 31)]
    with torch.inference_mode():
        for _ in range(20):
            scheduler.step()
        scheduler.pause("retract")
        assert not scheduler.can_step
        assert scheduler.flush_cache()
        load_folder(scheduler._network.weights, new.folder)
        scheduler.set_version("v1")
        scheduler.resume()
    run_all(scheduler)
    for length, future in zip((5, 70, 30, 31), futures, strict=True):
        completion = future.result(0)
        assert len(completion.token_ids) == 60
        spans = completion.versions
        split = spans[0].end if len(spans) == 2 else 0
        assert [s.version for s in spans] == (["v0", "v1"] if split else ["v1"])
        assert (spans[0].start, spans[-1].end) == (0, 60)
        measured = torch.tensor(completion.logprobs, dtype=torch.float64)
        under_old = old.response_logprobs(PROMPTS[length], completion.token_ids)
        under_new = new.response_logprobs(PROMPTS[length], completion.token_ids)
        torch.testing.assert_close(measured[:split], under_old[:split], rtol=0, atol=1e-5)
        torch.testing.assert_close(measured[split:], under_new[split:], rtol=0, atol=1e-5)
        assert (measured[split:] - under_old[split:]).abs().max() > 0.01
    assert len(futures[3].result().versions) == 1  # it waited for a slot when the weights changed


def test_in_place_keeps_the_latents_and_refuses_a_flush(
    saved: Callable, scheduler_of: Callable, submit: Callable, run_all: Callable
):
    scheduler = scheduler_of(saved("yarn"))
    whole = submit(scheduler, PROMPTS[9], seed=4, max_new_tokens=50)
    run_all(scheduler)
    future = submit(scheduler, PROMPTS[9], seed=4, max_new_tokens=50)
    with torch.inference_mode():
        for _ in range(10):
            scheduler.step()
    scheduler.pause("in_place")
    assert not scheduler.flush_cache()
    scheduler.resume()
    run_all(scheduler)
    assert future.result(0).token_ids == whole.result(0).token_ids


def test_broken_weights_abort_requests_and_leave_no_trace(
    saved: Callable, scheduler_of: Callable, submit: Callable, run_all: Callable
):
    own = saved("yarn")
    scheduler = scheduler_of(own, num_slots=1)
    good = submit(scheduler, PROMPTS[9], seed=1)
    run_all(scheduler)
    scheduler._network.weights.named["model.layers.1.self_attn.kv_a_layernorm.weight"].fill_(
        float("nan")
    )
    scheduler.flush_cache()
    bad = submit(scheduler, PROMPTS[30], seed=1)
    run_all(scheduler)
    assert bad.result(0).finish.kind == "abort"
    assert "not finite" in bad.result(0).finish.message
    load_folder(scheduler._network.weights, own.folder)
    scheduler.flush_cache()
    again = submit(scheduler, PROMPTS[9], seed=1)
    run_all(scheduler)
    assert again.result(0).logprobs == good.result(0).logprobs
