"""The recorder: one observation an iteration, tokens that reached nobody, and books that close."""

from __future__ import annotations

import pytest

from engine.schedule.batch import IterationCounts
from engine.schedule.record import COUNTERS, HISTOGRAMS, HISTOGRAMS_OF_SOME, Recorder
from engine.wire import FINISH_REASONS
from metrics.catalogue.metric import FINISHED_REASONS
from metrics.tally import GaugesOnly, Tally, TallyError
from tests.engine.workload import LAYOUT, NUM_API_SERVERS, Engine, Setup


@pytest.fixture
def engine() -> Engine:
    return Engine(Setup())


def test_one_iteration_is_one_observation_in_every_whole_iteration_histogram(engine):
    counts = IterationCounts(
        num_requests=3,
        num_prefill_tokens=12,
        num_decode_tokens=2,
        num_prompt_tokens_computed=9,
        num_recomputed_tokens=3,
        num_generated_tokens=3,
        num_preemptions=1,
    )
    engine.recorder.iteration(counts, 0.25)
    assert engine.histogram("vllm:iteration_tokens_total") == (1, 9 + 3 + 3)
    assert engine.histogram("wholebatch:iteration_scheduled_tokens") == (1, 14)
    assert engine.histogram("wholebatch:iteration_prefill_tokens") == (1, 12)
    assert engine.histogram("wholebatch:iteration_decode_tokens") == (1, 2)
    assert engine.histogram("wholebatch:iteration_requests") == (1, 3)
    assert engine.histogram("wholebatch:iteration_preemptions") == (1, 1)
    assert engine.histogram("wholebatch:iteration_duration_seconds", phase="mixed") == (1, 0.25)
    assert engine.value("wholebatch:iterations_total", phase="mixed") == 1


def test_an_iteration_without_decodes_or_preemptions_is_not_observed_as_one_of_none(engine):
    engine.recorder.iteration(IterationCounts(num_requests=1, num_prefill_tokens=4, num_prompt_tokens_computed=4), 0.1)
    assert engine.histogram("wholebatch:iteration_decode_tokens") == (0, 0)
    assert engine.histogram("wholebatch:iteration_preemptions") == (0, 0)
    assert engine.histogram("vllm:iteration_tokens_total") == (1, 4)
    assert engine.histogram("wholebatch:iteration_duration_seconds", phase="prefill") == (1, 0.1)


def test_every_engine_counter_of_the_tables_is_a_declared_metric():
    for name in (*HISTOGRAMS, *HISTOGRAMS_OF_SOME):
        LAYOUT.histogram(name)
    for name in COUNTERS:
        LAYOUT.cell(name)


def test_the_wire_and_the_catalogue_know_the_same_ends():
    assert FINISH_REASONS == FINISHED_REASONS


def test_a_duration_that_is_none_is_refused_after_everything_else_is_booked(engine):
    counts = IterationCounts(num_requests=1, num_decode_tokens=1, num_generated_tokens=1)
    with pytest.raises(TallyError, match="-1"):
        engine.recorder.iteration(counts, -1.0)
    assert engine.value("wholebatch:iterations_total", phase="decode") == 1
    assert engine.histogram("vllm:iteration_tokens_total") == (1, 1)


def test_stages_add_up(engine):
    engine.recorder.stages(receive_s=2.0, schedule_s=4.0, run_s=0.5, record_s=8.0)
    engine.recorder.stages(run_s=0.25, send_s=0.125)
    expected = {"receive": 2.0, "schedule": 4.0, "run": 0.75, "record": 8.0, "send": 0.125}
    for stage, seconds in expected.items():
        assert engine.value("wholebatch:iteration_stage_seconds_total", stage=stage) == seconds


def test_waiting_is_the_sum_of_its_reasons(engine):
    engine.recorder.gauges(2, 3, 4, 0.5)
    assert engine.value("vllm:num_requests_running") == 2
    assert engine.value("vllm:num_requests_waiting") == 7
    assert engine.value("vllm:num_requests_waiting_by_reason", reason="capacity") == 3
    assert engine.value("vllm:kv_cache_usage_perc") == 0.5
    engine.recorder.gauges(2, 3, 4, 0.25)
    engine.recorder.gauges(1, 0, 4, 0.25)
    assert engine.value("vllm:num_requests_running") == 1
    assert engine.value("vllm:num_requests_waiting") == 4
    assert engine.value("vllm:kv_cache_usage_perc") == 0.25


def test_what_was_sent_and_not_received_is_lost_once_and_with_its_reason(engine):
    recorder = engine.recorder
    recorder.sent(1, 10)
    assert recorder.settle(1, 7, "server_lost") == 3
    assert recorder.settle(1, 7, "engine_lost") == 0, "at the next Hello nothing new is missing"
    recorder.sent(1, 5)
    assert recorder.settle(1, 8, "engine_lost") == 4
    assert engine.value("wholebatch:lost_tokens_total", reason="server_lost", api_server="1") == 3
    assert engine.value("wholebatch:lost_tokens_total", reason="engine_lost", api_server="1") == 4
    assert recorder.settle(0, 0, "server_lost") == 0


def test_more_received_than_sent_is_no_loss(engine):
    engine.recorder.sent(1, 10)
    assert engine.recorder.settle(1, 12, "server_lost") == 0


def test_a_new_incarnation_ends_by_error_what_the_old_one_left_open(engine):
    for _ in range(5):
        engine.recorder.accepted()
    engine.recorder.finished("stop")
    engine.recorder.finished("abort")
    successor = Recorder(Tally(LAYOUT, engine.tally.cells), LAYOUT, NUM_API_SERVERS)
    assert successor.close_books() == 3
    assert successor.close_books() == 0
    assert engine.value("wholebatch:sequences_finished_total", finished_reason="error") == 3


def test_without_statistics_only_gauges_are_kept():
    engine = Engine(Setup(), tally=GaugesOnly(LAYOUT))
    engine.recorder.accepted()
    engine.recorder.sent(0, 3)
    engine.recorder.gauges(1, 2, 0, 0.25)
    engine.recorder.iteration(IterationCounts(num_requests=1, num_decode_tokens=1, num_generated_tokens=1), 0.1)
    assert engine.value("vllm:num_requests_running") == 1
    assert engine.histogram("vllm:iteration_tokens_total") == (0, 0)
    assert (engine.recorder.close_books(), engine.recorder.settle(0, 0, "server_lost")) == (0, 0)
