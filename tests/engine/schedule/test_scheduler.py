"""Whom the scheduler serves, whom it preempts, how requests end, and that it always gets on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import SchedulerConfig
from engine.schedule.batch import SampledToken
from engine.schedule.block_pool import BlockPool
from engine.schedule.request import RequestState
from engine.schedule.scheduler import Scheduler
from engine.wire import SamplingParams, Submit
from tests.engine.workload import EOS, MAX_MODEL_LEN, VOCAB_SIZE, Job, Setup, costly, jobs, run, tight_setups

TOKEN = 9  # neither EOS nor a stop token


def make(num_blocks: int = 64, block_size: int = 4, caches: bool = False, **limits: Any) -> Scheduler:
    return Scheduler(
        SchedulerConfig(**limits),
        BlockPool(num_blocks, block_size, caches),
        max_model_len=MAX_MODEL_LEN,
        eos_token_ids=frozenset({EOS}),
        vocab_size=VOCAB_SIZE,
    )


def add(scheduler: Scheduler, sequence_id: int, prompt_len: int, *, priority: int = 0, **sampling: Any) -> RequestState:
    params = SamplingParams(**{"max_tokens": 40, **sampling})
    prompt = [(sequence_id * 3 + i) % VOCAB_SIZE for i in range(prompt_len)]
    request = RequestState(sequence_id, (0, 1), Submit(sequence_id, 1, prompt, params, priority), 1.0)
    scheduler.add(request)
    return request


def iterate(scheduler: Scheduler, token: int = TOKEN) -> list[int]:
    """One iteration in which every sequence samples `token`; the ids of those served, in order."""
    batch = scheduler.schedule(2.0)
    assert batch is not None
    ids = [part.sequence_id for part in batch.sequences]
    scheduler.update(batch, [SampledToken(token, None) for part in batch.sequences if part.samples])
    return ids


# --- how many prompt tokens join those who decode ---


def iterate_timed(scheduler: Scheduler, token_s: float) -> list[int]:
    """One iteration that takes so long for each of its tokens; the tokens of its parts."""
    batch = scheduler.schedule(2.0)
    assert batch is not None
    sizes = [part.num_tokens for part in batch.sequences]
    sampled = [SampledToken(TOKEN, None) for part in batch.sequences if part.samples]
    scheduler.update(batch, sampled)
    scheduler.observe(batch.counts, token_s * sum(sizes))
    return sizes


def make_paced(**limits: Any) -> Scheduler:
    return Scheduler(
        SchedulerConfig(**limits),
        BlockPool(512, 16, False),
        max_model_len=4096,
        eos_token_ids=frozenset(),
        vocab_size=VOCAB_SIZE,
        suited_budget=512,
        suited_iteration_s=0.1,
    )


def chunks_beside_a_decode(scheduler: Scheduler, token_s: float, prompt_len: int = 2000) -> list[int]:
    """How a prompt is cut while another sequence decodes."""
    add(scheduler, 0, 4, max_tokens=1000)
    assert iterate_timed(scheduler, token_s) == [4]
    add(scheduler, 1, prompt_len)
    sizes: list[int] = []
    while sum(sizes) < prompt_len:
        decode, chunk = iterate_timed(scheduler, token_s)
        assert decode == 1
        sizes.append(chunk)
    return sizes


def test_a_prompt_alone_is_computed_at_the_whole_budget():
    scheduler = make_paced()
    add(scheduler, 0, 2000)
    assert [iterate_timed(scheduler, 1e-3) for _ in range(4)] == [[512], [512], [512], [464]]


def test_beside_a_decode_a_prompt_is_cut_so_that_iterations_take_what_suits():
    sizes = chunks_beside_a_decode(make_paced(), 1e-3)
    assert all(0.06 <= 1e-3 * (size + 1) <= 0.11 for size in sizes[:-1])
    assert all(1e-3 * (size + 1) >= 0.09 for size in sizes[5:-1])


def test_a_fast_device_comes_to_take_the_whole_budget():
    assert max(chunks_beside_a_decode(make_paced(), 1e-5, 3900)) == 511


def test_chunks_whose_length_or_absence_the_operator_chose_are_left_as_they_are():
    assert set(chunks_beside_a_decode(make_paced(long_prefill_token_threshold=200), 1e-3)) == {200}
    scheduler = make_paced(enable_chunked_prefill=False, max_num_batched_tokens=4096)
    assert chunks_beside_a_decode(scheduler, 1e-3) == [2000]


# --- who is served ---


def test_an_idle_scheduler_has_no_batch():
    scheduler = make()
    assert not scheduler.has_work
    assert scheduler.schedule(1.0) is None


def test_lower_priority_numbers_and_then_earlier_arrivals_are_served_first():
    scheduler = make(max_num_seqs=2)
    for sequence_id, priority in ((0, 5), (1, 5), (2, 0)):
        add(scheduler, sequence_id, 2, priority=priority)
    assert iterate(scheduler) == [2, 0]
    assert (scheduler.num_running, scheduler.num_waiting_capacity) == (2, 1)


def test_when_the_budget_is_short_the_first_in_order_decode_though_others_ran_before_them():
    scheduler = make(max_num_batched_tokens=2)
    add(scheduler, 0, 1, priority=5)
    assert iterate(scheduler) == [0]
    add(scheduler, 1, 1, priority=1)
    assert iterate(scheduler) == [0, 1]
    add(scheduler, 2, 1, priority=0)
    assert iterate(scheduler) == [1, 0]
    scheduler.abort(0)
    assert iterate(scheduler) == [1, 2]
    assert iterate(scheduler) == [2, 1]


def test_no_more_run_than_max_num_seqs():
    scheduler = make(max_num_seqs=3)
    for sequence_id in range(5):
        add(scheduler, sequence_id, 2)
    assert iterate(scheduler) == [0, 1, 2]
    scheduler.abort(1)
    assert iterate(scheduler) == [0, 2, 3]


def test_a_request_is_admitted_only_with_blocks_for_all_of_it_and_holds_up_those_behind_it():
    scheduler = make(num_blocks=4, max_num_batched_tokens=4)
    add(scheduler, 0, 9)
    add(scheduler, 1, 5)
    add(scheduler, 2, 1)
    assert iterate(scheduler) == [0]
    assert scheduler.kv_usage == 0.75
    assert iterate(scheduler) == [0]
    assert iterate(scheduler) == [0], "budget is left, a block is free, and 2 would fit: but it may not overtake 1"


# --- who is preempted ---


def test_the_last_in_order_gives_up_its_blocks_and_nobody_is_admitted_in_that_iteration():
    scheduler = make(num_blocks=4)
    requests = [add(scheduler, 0, 4), add(scheduler, 1, 1), add(scheduler, 2, 5)]
    assert iterate(scheduler) == [0, 1, 2]
    add(scheduler, 3, 1, priority=-1)
    assert iterate(scheduler) == [0, 1]
    assert [request.num_preemptions for request in requests] == [0, 0, 1]
    assert (scheduler.num_running, scheduler.num_waiting_capacity) == (2, 2)
    assert iterate(scheduler) == [0, 1, 3]


def test_a_lower_priority_is_preempted_before_a_later_arrival():
    scheduler = make(num_blocks=3)
    requests = [add(scheduler, 0, 4), add(scheduler, 1, 4, priority=9), add(scheduler, 2, 3)]
    assert iterate(scheduler) == [0, 2, 1]
    assert iterate(scheduler) == [0, 2]
    assert [request.num_preemptions for request in requests] == [0, 1, 0]


def test_the_last_in_order_preempts_itself_rather_than_anyone_else():
    scheduler = make(num_blocks=3)
    first, second = add(scheduler, 0, 5), add(scheduler, 1, 4)
    assert iterate(scheduler) == [0, 1]
    assert iterate(scheduler) == [0]
    assert (first.num_preemptions, second.num_preemptions) == (0, 1)
    assert (second.num_computed_tokens, second.high_water, second.block_table) == (0, 4, [])


def test_a_preempted_request_finds_its_own_blocks_again():
    scheduler = make(num_blocks=4, caches=True)
    add(scheduler, 0, 8, max_tokens=5)
    second = add(scheduler, 1, 4)
    while second.num_preemptions == 0:
        iterate(scheduler)
    batch = None
    while second.num_computed_tokens == 0:
        batch = scheduler.schedule(2.0)
        assert batch is not None
        scheduler.update(batch, [SampledToken(TOKEN, None) for part in batch.sequences if part.samples])
    assert batch is not None
    assert second.scheduled.start > 0
    assert second.num_cached_tokens == 0, "what it finds again is no hit"
    assert batch.counts.num_cache_queries == 0


def test_half_done_work_of_a_preempted_prefill_is_counted_as_recomputed():
    scheduler = make(num_blocks=5, long_prefill_token_threshold=1)
    add(scheduler, 0, 1, max_tokens=12)
    second = add(scheduler, 1, 15)
    counts = []
    while len(second.token_ids) == second.num_prompt_tokens:
        batch = scheduler.schedule(2.0)
        assert batch is not None
        counts.append(batch.counts)
        scheduler.update(batch, [SampledToken(TOKEN, None) for part in batch.sequences if part.samples])
    assert second.num_preemptions == 1
    assert sum(c.num_preemptions for c in counts) == 1
    assert sum(c.num_prompt_tokens_computed for c in counts) == 1 + 15
    assert sum(c.num_recomputed_tokens for c in counts) == 4


@given(setup=tight_setups, work=jobs())
@costly
def test_everything_ends_even_when_one_request_could_fill_the_whole_cache(setup, work):
    engine = run(setup, work)  # raises when it does not end
    assert len(engine.finishes) == len(work)
    assert engine.pool.num_free == setup.num_blocks


@given(work=jobs(), num_blocks=st.integers(1, 12), chunked=st.booleans(), budget=st.integers(1, 30))
@costly
def test_what_the_cache_cannot_hold_ends_by_error_and_holds_up_nobody(work, num_blocks, chunked, budget):
    config = SchedulerConfig(
        scheduling_policy="priority",
        max_num_batched_tokens=budget,
        enable_chunked_prefill=chunked,
        max_num_seqs=4,
    )
    engine = run(Setup(num_blocks=num_blocks, scheduler=config), work)
    assert len(engine.finishes) == len(work)
    for request_id, job in enumerate(work):
        finish = engine.finishes[(job.api_server, 1), request_id]
        length = len(job.prompt) + len(engine.output(request_id))
        if finish.reason == "error":
            assert finish.message is not None
            is_too_long = length > num_blocks * 4
            assert is_too_long or (not chunked and len(job.prompt) > budget)


# --- how requests end ---


@pytest.mark.parametrize(
    ("token", "sampling", "reason", "stop_token_id"),
    [
        (EOS, {}, "stop", None),
        (EOS, {"ignore_eos": True}, None, None),
        (EOS, {"min_tokens": 2}, None, None),
        (EOS, {"min_tokens": 1}, "stop", None),
        (EOS, {"max_tokens": 1}, "stop", None),
        (5, {"stop_token_ids": (4, 5)}, "stop", 5),
        (5, {"stop_token_ids": (4, 5), "min_tokens": 2}, None, None),
        (EOS, {"stop_token_ids": (EOS,), "ignore_eos": True}, "stop", EOS),
        (TOKEN, {"max_tokens": 1}, "length", None),
        (TOKEN, {"max_tokens": 2}, None, None),
    ],
)
def test_how_a_first_token_ends_a_request(token, sampling, reason, stop_token_id):
    scheduler = make()
    request = add(scheduler, 0, 3, **sampling)
    iterate(scheduler, token)
    assert (request.finish_reason, request.stop_token_id) == (reason, stop_token_id)
    assert scheduler.has_work == (reason is None)


def test_max_tokens_beyond_the_context_is_cut_to_fit():
    scheduler = make()
    request = add(scheduler, 0, MAX_MODEL_LEN - 3, max_tokens=1000)
    while scheduler.has_work:
        iterate(scheduler)
    assert (request.finish_reason, len(request.token_ids) - request.num_prompt_tokens) == ("length", 3)


def test_the_time_of_scheduling_is_that_of_the_first():
    scheduler = make()
    request = add(scheduler, 0, 3)
    for at in (10.0, 20.0, 30.0):
        batch = scheduler.schedule(at)
        assert batch is not None
        scheduler.update(batch, [SampledToken(TOKEN, None)])
    assert (request.arrived_at, request.scheduled_at) == (1.0, 10.0)


@pytest.mark.parametrize("num_iterations", [0, 1, 2])
def test_an_aborted_request_is_gone_wherever_it_was(num_iterations):
    scheduler = make(max_num_batched_tokens=4)
    request = add(scheduler, 0, 6)
    for _ in range(num_iterations):
        iterate(scheduler)
    assert scheduler.abort(0) is request
    assert request.finish_reason == "abort"
    assert scheduler.abort(0) is None
    assert (scheduler.has_work, scheduler.kv_usage, scheduler.schedule(1.0)) == (False, 0.0, None)


# --- what is refused ---


@pytest.mark.parametrize(
    ("prompt", "sampling", "complaint"),
    [
        ([], {}, "empty"),
        ([1] * MAX_MODEL_LEN, {}, f"exceeds the context of {MAX_MODEL_LEN}"),
        ([1] * 17, {}, "the KV cache holds 16"),
        ([1, VOCAB_SIZE], {}, f"prompt holds token {VOCAB_SIZE}"),
        ([1], {"stop_token_ids": (99,)}, "stop_token_ids holds token 99"),
        ([1], {"logit_bias": ((99, 1.0),)}, "logit_bias holds token 99"),
        ([1] * 16, {}, None),
    ],
)
def test_what_can_never_run_is_refused_with_a_reason(prompt, sampling, complaint):
    submit = Submit(1, 1, prompt, SamplingParams(max_tokens=1, **sampling))
    refusal = make(num_blocks=4).refusal(submit)
    assert refusal is None if complaint is None else complaint in str(refusal)


@pytest.mark.parametrize(("policy", "is_refused"), [("fcfs", True), ("priority", False)])
def test_a_priority_is_for_an_engine_whose_operator_lets_clients_choose(policy: str, is_refused: bool):
    submit = Submit(1, 1, [1], SamplingParams(max_tokens=1), priority=-1)
    assert (make(scheduling_policy=policy).refusal(submit) is not None) == is_refused
    assert make(scheduling_policy=policy).refusal(replace(submit, priority=0)) is None


def test_without_chunked_prefill_a_prompt_longer_than_the_budget_is_refused():
    submit = Submit(1, 1, [1] * 9, SamplingParams(max_tokens=1))
    assert make(max_num_batched_tokens=8).refusal(submit) is None
    assert "at most 8" in str(make(max_num_batched_tokens=8, enable_chunked_prefill=False).refusal(submit))


# --- the prefix cache ---


def test_a_prefix_is_found_but_its_last_token_is_always_computed():
    work = [Job(prompt=tuple(range(8)), max_tokens=1), Job(prompt=tuple(range(8)), max_tokens=1, arrives=2)]
    engine = run(Setup(), work)
    assert engine.runner.batches == [[(0, 0, 8)], [(1, 4, 4)]]
    assert engine.starts[(0, 1), 1].num_cached_tokens == 4
    assert engine.value("vllm:prefix_cache_queries_total") == 16
    assert engine.value("vllm:prefix_cache_hits_total") == 4
    assert engine.value("vllm:prompt_tokens_total") == 16
    assert engine.value("vllm:prompt_tokens_by_source_total", source="local_compute") == 12
    assert engine.histogram("vllm:iteration_tokens_total") == (2, 8 + 1 + 4 + 1)


def test_blocks_filled_by_decoding_are_found_too():
    first = run(Setup(), [Job(prompt=tuple(range(6)), max_tokens=7, ignore_eos=True)])
    conversation = tuple(range(6)) + tuple(first.output(0))
    first.run([Job(prompt=(*conversation, 1, 2), api_server=1, max_tokens=1)])
    assert first.starts[(1, 1), 0].num_cached_tokens == 12, "of 13 known tokens all but the newest are computed"


def test_two_requests_with_the_same_prompt_in_one_iteration_share_nothing_yet_and_agree():
    engine = run(Setup(), [Job(prompt=tuple(range(8)), max_tokens=4) for _ in range(2)])
    assert engine.output(0) == engine.output(1)
    assert engine.value("vllm:prefix_cache_hits_total") == 0
