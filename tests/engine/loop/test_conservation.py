"""The laws of the engine's figures, under random submits, aborts, preemption, priorities and dropped API servers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import SchedulerConfig
from engine.schedule.batch import Batch, SampledToken
from engine.wire import FINISH_REASONS
from tests.engine.workload import (
    LAYOUT,
    MAX_MODEL_LEN,
    NUM_API_SERVERS,
    Engine,
    Job,
    Setup,
    costly,
    jobs,
    run,
    setups,
    tight_setups,
    with_scheduler,
)
from tests.fakes import fake_output

SERVER_CELLS = [
    LAYOUT.cell(name, api_server=str(index), **labels)
    for index in range(NUM_API_SERVERS)
    for name, labels in (
        ("wholebatch:tokens_sent_total", {}),
        ("wholebatch:lost_tokens_total", {"reason": "server_lost"}),
        ("wholebatch:lost_tokens_total", {"reason": "engine_lost"}),
    )
]


def check_laws(engine: Engine) -> None:
    """Laws 1, 2, 4 and 5, and that the histograms say what an independent log of the batches says."""
    value, histogram = engine.value, engine.histogram
    count, total = histogram("vllm:iteration_tokens_total")
    computed, recomputed = (
        value("wholebatch:prompt_tokens_computed_total"),
        value("wholebatch:recomputed_tokens_total"),
    )
    generated = value("vllm:generation_tokens_total")
    assert total == computed + recomputed + generated
    assert generated == sum(len(tokens) for tokens in engine.tokens.values())
    assert generated == sum(
        value("wholebatch:tokens_sent_total", api_server=str(index)) for index in range(NUM_API_SERVERS)
    )
    phases = [value("wholebatch:iterations_total", phase=phase) for phase in ("prefill", "decode", "mixed")]
    assert count == len(engine.seen) == sum(phases)
    assert histogram("wholebatch:iteration_scheduled_tokens") == (count, sum(map(sum, engine.seen)))
    assert histogram("wholebatch:iteration_requests") == (count, sum(map(len, engine.seen)))
    num_prefills, prefill_tokens = histogram("wholebatch:iteration_prefill_tokens")
    num_decodes, decode_tokens = histogram("wholebatch:iteration_decode_tokens")
    assert prefill_tokens + decode_tokens == sum(map(sum, engine.seen))
    assert (num_prefills, num_decodes) == (phases[0] + phases[2], phases[1] + phases[2])
    assert histogram("wholebatch:iteration_preemptions")[1] == value("vllm:num_preemptions_total")
    from_cache = value("vllm:prompt_tokens_by_source_total", source="local_cache_hit")
    from_compute = value("vllm:prompt_tokens_by_source_total", source="local_compute")
    assert value("vllm:prompt_tokens_total") == from_cache + from_compute
    assert value("vllm:prompt_tokens_cached_total") == from_cache
    assert value("vllm:prefix_cache_hits_total") >= from_cache
    from_device = value("vllm:prompt_tokens_cached_by_source_total", source="device")
    assert value("vllm:prefix_cache_hits_total") == from_device
    finished = sum(value("wholebatch:sequences_finished_total", finished_reason=r) for r in FINISH_REASONS)
    running, waiting = value("vllm:num_requests_running"), value("vllm:num_requests_waiting")
    assert value("wholebatch:sequences_accepted_total") == finished + running + waiting


def fault_at(engine: Engine, places: set[tuple[int, int]]) -> None:
    """No token can be sampled at these (sequence id, number of tokens generated so far)."""
    run = engine.runner.run

    def run_with_faults(batch: Batch) -> list[SampledToken]:
        sampling = [part for part in batch.sequences if part.samples]
        return [
            SampledToken(-1, None, "a fault")
            if (part.sequence_id, len(part.token_ids) - part.num_prompt_tokens) in places
            else token
            for part, token in zip(sampling, run(batch), strict=True)
        ]

    engine.runner.run = run_with_faults  # type: ignore[method-assign]


@given(
    setup=setups | tight_setups,
    work=jobs(can_abort=True),
    dropped=st.none() | st.integers(0, 15),
    faults=st.sets(st.tuples(st.integers(0, 7), st.integers(0, 6)), max_size=4),
)
@costly
def test_the_books_balance_in_every_iteration_whatever_happens(setup, work, dropped, faults):
    engine = Engine(setup)
    fault_at(engine, faults)
    for now in range(400):
        for request_id, job in enumerate(work):
            if job.arrives == now:
                engine.submit(request_id, job)
            if job.aborted == now:
                engine.core.abort((job.api_server, 1), [request_id])
        if now == dropped:
            engine.core.drop_api_server((0, 1))
        engine.step()
        check_laws(engine)
        assert not engine.faults, engine.faults
        if now > 20 and not engine.core.has_work:
            break
    assert not engine.core.has_work
    assert engine.pool.num_free == setup.num_blocks, "blocks leaked"
    assert engine.value("vllm:num_requests_running") == engine.value("vllm:num_requests_waiting") == 0
    assert engine.value("vllm:kv_cache_usage_perc") == 0
    answered = {key for key in engine.finishes if key in engine.tokens}
    reasons = [engine.finishes[key].reason for key in answered]
    assert set(reasons) <= {"stop", "length", "error"}
    assert reasons.count("error") <= engine.value("wholebatch:sampling_faults_total") <= len(faults)


@given(setup=setups | tight_setups, work=jobs())
@costly
def test_a_request_that_is_never_preempted_costs_its_prompt_and_its_output(setup, work):
    engine = run(with_scheduler(setup, max_num_seqs=1), work)
    for start in engine.starts.values():
        assert start.num_preemptions == 0
    prompts = sum(len(job.prompt) for job in work)
    cached = sum(start.num_cached_tokens for start in engine.starts.values())
    generated = sum(len(tokens) for tokens in engine.tokens.values())
    assert engine.histogram("vllm:iteration_tokens_total")[1] == prompts - cached + generated
    assert engine.histogram("wholebatch:iteration_scheduled_tokens")[1] == prompts - cached + generated - len(work)
    assert engine.value("wholebatch:recomputed_tokens_total") == 0
    assert engine.value("vllm:prefix_cache_hits_total") == cached


@given(setup=setups | tight_setups, work=jobs(), split=st.lists(st.integers(0, NUM_API_SERVERS - 1), min_size=8))
@costly
def test_any_split_over_api_servers_gives_the_figures_of_one(setup, work, split):
    """The partition property: who asked for a request is invisible in everything but tokens_sent."""
    one = [Job(**{**vars(job), "api_server": 0}) for job in work]
    many = [Job(**{**vars(job), "api_server": server}) for job, server in zip(work, split, strict=False)]
    cells = []
    for same_work in (one, many):
        engine = run(setup, same_work)
        cells.append([value for cell, value in enumerate(engine.tally.cells) if cell not in SERVER_CELLS])
    assert cells[0] == cells[1]


@given(setup=tight_setups, work=jobs())
@costly
def test_a_preempted_request_gives_the_same_tokens(setup, work):
    engine = run(setup, work)
    for request_id, job in enumerate(work):
        tokens = engine.output(request_id)
        assert tokens == fake_output(job.prompt, len(tokens), 40)
        finish = engine.finishes[(job.api_server, 1), request_id]
        if finish.reason == "length":
            assert len(tokens) == min(job.max_tokens, MAX_MODEL_LEN - len(job.prompt))
        else:
            assert finish.reason == "stop"
    cached = sum(start.num_cached_tokens for start in engine.starts.values())
    assert engine.value("vllm:prefix_cache_hits_total") == cached, "counted at the first admission, never on resume"
    assert engine.value("vllm:prompt_tokens_cached_total") == cached


def crowd(num_blocks: int) -> tuple[Setup, list[Job]]:
    """Four requests that all fit at first and grow until they do not."""
    setup = Setup(num_blocks=num_blocks, enable_prefix_caching=False, scheduler=SchedulerConfig(max_num_seqs=4))
    return setup, [Job(prompt=tuple(range(i, i + 8)), max_tokens=16, ignore_eos=True) for i in range(4)]


def test_preemption_does_happen_and_recomputed_tokens_are_told_apart():
    engine = run(*crowd(num_blocks=12))
    preemptions = sum(start.num_preemptions for start in engine.starts.values())
    assert preemptions > 0
    assert engine.value("vllm:num_preemptions_total") == preemptions
    assert engine.value("wholebatch:prompt_tokens_computed_total") == 4 * 8
    assert engine.value("vllm:generation_tokens_total") == 4 * 16
    assert engine.value("wholebatch:recomputed_tokens_total") > 0
    check_laws(engine)


def test_a_bad_duration_stops_no_request_spoils_no_other_figure_and_is_counted(caplog: pytest.LogCaptureFixture):
    setup, work = crowd(num_blocks=64)
    engine = Engine(setup)
    engine.core._clock = lambda: float("nan")
    for request_id, job in enumerate(work):
        engine.submit(request_id, job)
    while engine.core.has_work:
        engine.step()
    assert [len(engine.output(i)) for i in range(4)] == [16] * 4
    check_laws(engine)
    assert len(engine.seen) == len(engine.faults) > 0
    assert engine.value("wholebatch:bulkhead_errors_total", where="record") == len(engine.faults)
    assert [record.message for record in caplog.records if "nan" in record.message] != []
