"""Chunked prefill changes how many iterations there are, never what they add up to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given

from engine.config import SchedulerConfig
from tests.engine.workload import Job, Setup, costly, jobs, run, schedulers, setups


@given(setup=setups, config=schedulers, work=jobs())
@costly
def test_any_budget_and_threshold_gives_the_same_tokens_and_the_same_sums(setup, config, work):
    """Without the prefix cache and with blocks for all: nothing but the chunks differs."""
    roomy = replace(setup, num_blocks=48 * 8, enable_prefix_caching=False)
    engines = [run(roomy, work), run(replace(roomy, scheduler=config), work)]
    tokens = [[engine.output(request_id) for request_id in range(len(work))] for engine in engines]
    assert tokens[0] == tokens[1]
    for name in ("vllm:iteration_tokens_total", "wholebatch:iteration_scheduled_tokens"):
        (count_a, sum_a), (count_b, sum_b) = (engine.histogram(name) for engine in engines)
        assert sum_a == sum_b
        assert (count_a, count_b) == tuple(len(engine.runner.batches) for engine in engines)


@given(setup=setups, work=jobs())
@costly
def test_the_cache_on_off_or_warm_gives_the_same_tokens(setup, work):
    cold = run(replace(setup, enable_prefix_caching=False), work)
    warm = run(replace(setup, enable_prefix_caching=True), work)
    expected = [cold.output(request_id) for request_id in range(len(work))]
    assert [warm.output(request_id) for request_id in range(len(work))] == expected
    again = [replace(job, api_server=(job.api_server + 1) % 4) for job in work]
    warm.tokens.clear()
    warm.finishes.clear()
    warm.run(again)
    assert [warm.output(request_id) for request_id in range(len(work))] == expected


def chunks(config: SchedulerConfig, *lengths: int) -> list[tuple[int, ...]]:
    """The tokens of each part of each iteration, for prompts of these lengths that generate one token each."""
    work = [Job(prompt=tuple((i * 13 + j) % 40 for j in range(n)), max_tokens=1) for i, n in enumerate(lengths)]
    return run(Setup(enable_prefix_caching=False, scheduler=config), work).seen


def test_a_prompt_is_cut_at_the_budget_and_every_chunk_is_an_iteration():
    assert chunks(SchedulerConfig(max_num_batched_tokens=4), 10) == [(4,), (4,), (2,)]


def test_a_chunk_is_no_longer_than_the_threshold_and_the_rest_of_the_budget_goes_to_others():
    config = SchedulerConfig(max_num_batched_tokens=10, long_prefill_token_threshold=4)
    assert chunks(config, 9, 3) == [(4, 3), (4,), (1,)]


def test_the_threshold_is_of_no_effect_without_chunked_prefill():
    config = SchedulerConfig(enable_chunked_prefill=False, long_prefill_token_threshold=4)
    assert chunks(config, 9) == [(9,)]


def test_without_chunked_prefill_a_prompt_waits_until_it_fits_whole_and_is_not_overtaken():
    config = SchedulerConfig(max_num_batched_tokens=10, enable_chunked_prefill=False)
    assert chunks(config, 6, 5, 1) == [(6,), (5, 1)]


def test_decodes_come_first_then_chunks_then_new_requests():
    config = SchedulerConfig(max_num_batched_tokens=6, scheduling_policy="priority")
    work = [
        Job(prompt=(1, 2), max_tokens=9, ignore_eos=True),
        Job(prompt=tuple(range(12)), max_tokens=1, arrives=1),
        Job(prompt=(5, 6, 7), max_tokens=1, arrives=2, priority=-1),
    ]
    engine = run(Setup(enable_prefix_caching=False, scheduler=config), work)
    assert engine.runner.batches[:4] == [
        [(0, 0, 2)],
        [(0, 2, 1), (1, 0, 5)],
        [(0, 3, 1), (1, 5, 5)],
        [(0, 4, 1), (1, 10, 2), (2, 0, 3)],
    ]


def test_the_last_single_position_of_a_prompt_is_prefill_and_the_next_is_decode():
    config = SchedulerConfig(max_num_batched_tokens=4)
    engine = run(Setup(scheduler=config), [Job(prompt=(1, 2, 3, 4, 5), max_tokens=2, ignore_eos=True)])
    assert engine.seen == [(4,), (1,), (1,)]
    assert engine.histogram("wholebatch:iteration_prefill_tokens") == (2, 5)
    assert engine.histogram("wholebatch:iteration_decode_tokens") == (1, 1)


@pytest.mark.parametrize("length", [1, 2])
def test_a_one_token_prompt_is_prefill_too(length):
    engine = run(Setup(), [Job(prompt=(1,), max_tokens=length, ignore_eos=True)])
    assert engine.histogram("wholebatch:iteration_prefill_tokens") == (1, 1)
    assert engine.histogram("vllm:iteration_tokens_total") == (length, 1 + length)


@pytest.mark.parametrize(
    ("named", "budget"),
    [
        ({}, 512),
        ({"max_num_batched_tokens": 300}, 300),
        ({"max_num_seqs": 700}, 700),
        ({"enable_chunked_prefill": False}, 2000),
        ({"enable_chunked_prefill": False, "max_num_batched_tokens": 600}, 600),
    ],
)
def test_the_budget_suits_the_device_unless_it_is_named_or_other_limits_need_more(named: dict[str, Any], budget: int):
    assert SchedulerConfig(**named).budget(512, max_model_len=2000) == budget
