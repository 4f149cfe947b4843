"""What an API server counts: the same however requests are split over API servers, and with books that close."""

from __future__ import annotations

import asyncio
import logging
import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frontend.counters.group_commit import GroupCommit
from frontend.counters.request_record import EndedRequest, EngineTimes, FinishedSequence, HTTPAnswer, RequestRecord
from metrics.bulkhead import Bulkhead
from metrics.catalogue import API_SERVER
from metrics.files.exemplars import Origin
from metrics.layout import Histogram, Layout, Shape, build_layout
from metrics.tally import GaugesOnly, Tally
from tests.fakes import fake_group

NUM_ENGINES = 2
LAYOUT = build_layout(API_SERVER, Shape(num_engines=NUM_ENGINES, num_api_servers=4, max_model_len=2048))


def make(layout: Layout = LAYOUT) -> tuple[RequestRecord, Tally]:
    tally = Tally(layout)
    return RequestRecord(tally, layout, NUM_ENGINES), tally


def cell(tally: Tally, name: str, **labels: str) -> float:
    return tally.cells[tally.layout.cell(name, **labels)]


def observed(tally: Tally, name: str, **labels: str) -> tuple[float, float]:
    """(count, sum)"""
    histogram: Histogram = tally.layout.histogram(name, **labels)
    end = histogram.offset + len(histogram.bounds) + 1
    return sum(tally.cells[histogram.offset : end]), tally.cells[end]


def finished(**changes: object) -> FinishedSequence:
    fields: dict[str, object] = {
        "reason": "length",
        "num_prompt_tokens": 10,
        "num_cached_tokens": 4,
        "num_tokens": 8,
        "max_tokens": 8,
        "num_preemptions": 1,
        "e2e_s": 2.0,
        "decode_s": 1.75,
        "engine": EngineTimes(queue_s=0.25, prefill_s=0.5, inference_s=2.25),
    }
    return FinishedSequence(**(fields | changes))  # type: ignore[arg-type]


def test_a_finished_request_of_one_sequence_is_observed_once_in_every_histogram():
    record, tally = make()
    record.engines[1].finished(finished())
    record.engines[1].request_ended(EndedRequest(reason="length", num_tokens=[8], latency_s=2.0))
    expected = {
        "e2e_request_latency_seconds": 2.0,
        "request_queue_time_seconds": 0.25,
        "request_prefill_time_seconds": 0.5,
        "request_decode_time_seconds": 1.75,
        "request_inference_time_seconds": 2.25,
        "request_time_per_output_token_seconds": 0.25,
        "request_prompt_tokens": 10,
        "request_prefill_kv_computed_tokens": 6,
        "request_generation_tokens": 8,
        "request_max_num_generation_tokens": 8,
        "request_params_n": 1,
        "request_params_max_tokens": 8,
        "request_num_preemptions": 1,
    }
    for name, value in expected.items():
        assert observed(tally, f"vllm:{name}", engine="1") == (1, value), name
        assert observed(tally, f"vllm:{name}", engine="0") == (0, 0), name
    assert cell(tally, "vllm:request_success_total", engine="1", finished_reason="length") == 1


def test_each_of_n_sequences_counts_as_vllm_counts_it_and_the_request_once_under_our_names():
    record, tally = make()
    engine = record.engines[0]
    for seconds, num_tokens, reason in ((0.5, 8, "length"), (0.75, 5, "length"), (1.0, 3, "stop")):
        engine.first_token(seconds)
        engine.finished(finished(num_tokens=num_tokens, reason=reason))
    engine.request_first_token(0.5)
    engine.request_ended(EndedRequest(reason="length", num_tokens=[8, 5, 3], latency_s=2.5))
    expected = {
        "vllm:time_to_first_token_seconds": (3, 2.25),
        "vllm:e2e_request_latency_seconds": (3, 6.0),
        "vllm:request_prompt_tokens": (3, 30),
        "vllm:request_generation_tokens": (3, 16),
        "vllm:request_max_num_generation_tokens": (1, 8),
        "vllm:request_params_n": (1, 3),
        "wholebatch:request_time_to_first_token_seconds": (1, 0.5),
        "wholebatch:request_latency_seconds": (1, 2.5),
        "wholebatch:request_output_tokens": (1, 16),
    }
    assert {name: observed(tally, name, engine="0") for name in expected} == expected
    ended = {
        (name, reason): cell(tally, f"{name}_total", engine="0", finished_reason=reason)
        for name in ("vllm:request_success", "wholebatch:request_ended")
        for reason in ("length", "stop")
    }
    assert list(ended.values()) == [2, 1, 1, 0]


def test_the_time_per_token_of_a_single_token_is_zero():
    record, tally = make()
    record.engines[0].finished(finished(num_tokens=1, decode_s=0.0))
    assert observed(tally, "vllm:request_time_per_output_token_seconds", engine="0") == (1, 0)


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_a_request_that_was_given_up_counts_in_no_histogram(reason: str):
    record, tally = make()
    record.engines[0].gave_up(reason)
    assert cell(tally, "vllm:request_success_total", engine="0", finished_reason=reason) == 1
    assert sum(tally.cells) == 1 + sum(Tally(LAYOUT).cells)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_a_value_that_cannot_be_observed_is_counted_as_a_fault_and_raises_nothing(value: float):
    record, tally = make()
    record.engines[0].first_token(value)
    assert cell(tally, "wholebatch:bulkhead_errors_total", where="record") == 1
    assert observed(tally, "vllm:time_to_first_token_seconds", engine="0") == (0, 0)


def test_exemplars_are_told_of_requests_whose_origin_is_known_and_of_what_was_observed():
    tally, told = Tally(LAYOUT), []
    record = RequestRecord(tally, LAYOUT, NUM_ENGINES, lambda *observed: told.append(observed))
    engine, origin = record.engines[1], Origin("request_id", "cmpl-1")
    engine.first_token(0.5)
    engine.finished(finished())
    assert told == []
    engine.first_token(0.5, origin)
    engine.finished(finished(origin=origin, longest_gap_s=0.25))
    engine.finished(finished(origin=origin))  # one token: no gap
    names = ("time_to_first_token", "e2e_request_latency", "inter_token_latency", "e2e_request_latency")
    histograms = [LAYOUT.histogram(f"vllm:{name}_seconds", engine="1") for name in names]
    assert told == [(h, v, origin) for h, v in zip(histograms, (0.5, 2.0, 0.25, 2.0), strict=True)]


def test_http_answers_count_by_template_and_class_and_nothing_else_makes_a_series():
    record, tally = make()
    sizes = {"num_request_bytes": 70, "num_response_bytes": 300}
    record.answered(HTTPAnswer(method="POST", handler="/v1/completions", status=200, seconds=0.5, **sizes))
    record.answered(HTTPAnswer(method="BREW", handler="/v1/nobody/knows/17", status=418, seconds=0.5))
    assert cell(tally, "http_requests_total", method="POST", handler="/v1/completions", status="2xx") == 1
    assert cell(tally, "http_requests_total", method="other", handler="none", status="4xx") == 1
    name = "http_request_duration_seconds"
    assert observed(tally, name, method="POST", handler="/v1/completions") == (1, 0.5)
    assert observed(tally, "http_request_duration_highr_seconds") == (2, 1.0)
    assert observed(tally, "http_request_size_bytes", handler="/v1/completions") == (1, 70)
    assert observed(tally, "http_response_size_bytes", handler="/v1/completions") == (1, 300)


def test_closing_the_books_settles_exactly_what_was_open():
    record, tally = make()
    engine = record.engines[0]
    for _ in range(3):
        engine.submitted()
    engine.ended("stop")
    engine.received(10)
    engine.delivered(4)
    engine.undelivered(1, "disconnect")
    record.flush()
    record.close_books()
    assert cell(tally, "wholebatch:undelivered_tokens_total", engine="0", reason="server_lost") == 5
    assert cell(tally, "wholebatch:sequences_ended_total", engine="0", finished_reason="server_lost") == 2
    before = list(tally.cells)
    record.close_books()
    assert list(tally.cells) == before


def test_without_statistics_only_the_gauge_is_kept():
    tally = GaugesOnly(LAYOUT)
    record = RequestRecord(tally, LAYOUT, NUM_ENGINES)
    record.engines[0].submitted()
    record.engines[0].received(3)
    assert cell(tally, "wholebatch:api_server_requests_in_flight", engine="0") == 1
    assert record.engines[0].num_received == 0


# --- partition: any split of the requests over N API servers sums to what one API server counts ---


@dataclass(frozen=True)
class Life:
    """One request, as an API server meets it. Times are eighths of a second, so that sums are exact."""

    engine: int
    api_server: int
    gaps: tuple[int, ...]
    reason: str
    num_delivered: int


@st.composite
def lives(draw: st.DrawFn) -> Life:
    gaps = tuple(draw(st.lists(st.integers(0, 400), min_size=1, max_size=6)))
    return Life(
        engine=draw(st.integers(0, NUM_ENGINES - 1)),
        api_server=draw(st.integers(0, 3)),
        gaps=gaps,
        reason=draw(st.sampled_from(["stop", "length", "repetition", "abort", "error"])),
        num_delivered=draw(st.integers(0, len(gaps))),
    )


def live(record: RequestRecord, life: Life) -> None:
    engine = record.engines[life.engine]
    engine.submitted()
    engine.received(len(life.gaps))
    engine.first_token(life.gaps[0] / 8)
    for gap in life.gaps[1:]:
        engine.later_tokens(gap / 8, 1)
    engine.delivered(life.num_delivered)
    engine.undelivered(len(life.gaps) - life.num_delivered, "disconnect")
    engine.ended(life.reason)
    if life.reason in ("abort", "error"):
        engine.gave_up(life.reason)
    else:
        engine.finished(finished(reason=life.reason, num_tokens=len(life.gaps), decode_s=sum(life.gaps[1:]) / 8))


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.125, 0.25, 3.0]), st.integers(1, 4))))
def test_gaps_are_observed_each_as_often_as_it_came_however_they_follow_one_another(gaps: list[tuple[float, int]]):
    record, tally = make()
    histogram = LAYOUT.histogram("vllm:inter_token_latency_seconds", engine="0")
    expected = Tally(LAYOUT)
    for gap_s, num_tokens in gaps:
        record.engines[0].later_tokens(gap_s, num_tokens)
        expected.observe(histogram, gap_s, num_tokens)
    record.flush()
    assert tally.cells == expected.cells


@settings(max_examples=200)
@given(st.lists(lives(), max_size=12), st.integers(1, 4))
def test_any_split_over_api_servers_sums_to_what_one_counts(requests: list[Life], num_api_servers: int):
    one, whole = make()
    many = [make() for _ in range(num_api_servers)]
    for life in requests:
        live(one, life)
        live(many[life.api_server % num_api_servers][0], life)
    for record, _ in ((one, whole), *many):
        record.flush()
    counters = ~LAYOUT.gauges
    summed = np.sum([np.frombuffer(tally.cells) for _, tally in many], axis=0)
    np.testing.assert_allclose(summed[counters], np.frombuffer(whole.cells)[counters], rtol=1e-12)


@settings(max_examples=200)
@given(st.lists(lives(), max_size=12))
def test_every_received_token_and_every_sequence_is_settled_once_all_requests_are_over(requests: list[Life]):
    record, tally = make()
    for life in requests:
        live(record, life)
    record.flush()
    before = list(tally.cells)
    record.close_books()
    assert list(tally.cells) == before


# --- the group commit ---


class Commits:
    def __init__(self) -> None:
        self.num = 0
        self.fails = False

    def __call__(self) -> None:
        self.num += 1
        if self.fails:
            raise OSError("no space left on device")


async def test_everybody_who_waits_in_one_tick_shares_one_commit():
    commits = Commits()
    group = fake_group(commits)
    await asyncio.gather(*(group.committed() for _ in range(50)))
    assert commits.num == 1
    await group.committed()
    assert commits.num == 2


async def test_a_waiter_that_is_cancelled_takes_nobody_with_it():
    group = fake_group(Commits())
    first, second = asyncio.ensure_future(group.committed()), asyncio.ensure_future(group.committed())
    await asyncio.sleep(0)
    first.cancel()
    await second
    assert first.cancelled()


async def test_a_commit_that_fails_is_reported_and_nobody_who_waits_learns_of_it():
    commits = Commits()
    faults: list[str] = []
    commits.fails = True
    group = GroupCommit(commits, Bulkhead(faults.append, logging.getLogger(__name__)))
    await group.committed()
    assert faults == ["commit"]
