"""Counting, against a model too simple to be wrong: a dict, and lists of what was observed."""

from __future__ import annotations

import math
from array import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metrics.catalogue import API_SERVER, ENGINE
from metrics.layout import Shape, build_layout
from metrics.tally import GaugesOnly, Tally, TallyError

LAYOUT = build_layout(ENGINE, Shape(num_engines=1, num_api_servers=2, max_model_len=100))
HISTOGRAM = LAYOUT.histogram("vllm:iteration_tokens_total")
COUNTER = LAYOUT.cell("vllm:generation_tokens_total")
GAUGE = LAYOUT.cell("vllm:num_requests_running")
HISTOGRAMS = [LAYOUT.histogram(s.metric.name, **dict(s.labels)) for s in LAYOUT.series if s.bounds is not None]

observations = st.lists(
    st.tuples(
        st.sampled_from(HISTOGRAMS),
        st.one_of(st.integers(0, 20_000), st.sampled_from([1, 8, 16, 0.001, 0.5])),
        st.integers(0, 3),
    )
)
bad = st.sampled_from([math.nan, math.inf, -math.inf])


@given(observations)
def test_buckets_do_not_fall_and_agree_with_count_and_sum(observed):
    tally = Tally(LAYOUT)
    for histogram, value, count in observed:
        tally.observe(histogram, value, count)
    for histogram in HISTOGRAMS:
        mine = [value for h, value, count in observed if h == histogram for _ in range(count)]
        cells = tally.cells[histogram.offset : histogram.offset + len(histogram.bounds) + 2]
        cumulative = np.cumsum(cells[:-1])
        assert cumulative.tolist() == [sum(v <= bound for v in mine) for bound in (*histogram.bounds, math.inf)]
        assert cumulative[-1] == len(mine)
        assert cells[-1] == pytest.approx(sum(mine))


@given(st.lists(st.tuples(observations, st.integers(0, 1000)), min_size=1, max_size=5))
def test_however_observations_are_split_the_tallies_sum_to_the_tally_of_one(parts):
    """Values are whole or dyadic here, so that sums are exact in any order."""
    one, total = Tally(LAYOUT), np.zeros(LAYOUT.num_cells)
    for observed, amount in parts:
        part = Tally(LAYOUT)
        for tally in (one, part):
            tally.inc(COUNTER, amount)
            for histogram, value, count in observed:
                tally.observe(histogram, value if value != 0.001 else 0.0009765625, count)
        total += np.where(LAYOUT.gauges, 0.0, np.frombuffer(part.cells))
    assert np.array_equal(total, np.where(LAYOUT.gauges, 0.0, np.frombuffer(one.cells)))


@given(st.lists(st.tuples(st.booleans(), st.floats(-1e9, 1e9))))
def test_counters_only_grow_and_gauges_keep_the_latest(steps):
    tally, counted, latest = Tally(LAYOUT), 0.0, 0.0
    for is_counter, value in steps:
        if not is_counter:
            tally.set(GAUGE, value)
            latest = value
        elif value >= 0:
            tally.inc(COUNTER, value)
            counted += value
        else:
            with pytest.raises(TallyError):
                tally.inc(COUNTER, value)
        assert (tally.cells[COUNTER], tally.cells[GAUGE]) == (counted, latest)


@given(bad)
def test_what_is_no_number_is_refused_and_changes_nothing(value: float):
    tally = Tally(LAYOUT)
    before = tally.cells[:]
    for refused in (
        lambda: tally.inc(COUNTER, value),
        lambda: tally.set(GAUGE, value),
        lambda: tally.observe(HISTOGRAM, value),
        lambda: tally.observe(HISTOGRAM, -1.0),
        lambda: tally.observe(HISTOGRAM, 1.0, -1),
    ):
        with pytest.raises(TallyError):
            refused()
    assert tally.cells == before


def test_a_value_on_a_bound_counts_below_it():
    tally = Tally(LAYOUT)
    tally.observe(HISTOGRAM, 8)
    assert tally.cells[HISTOGRAM.offset + HISTOGRAM.bounds.index(8)] == 1


def test_the_engine_is_awake_before_anybody_says_so():
    awake = LAYOUT.cell("vllm:engine_sleep_state", sleep_state="awake")
    assert Tally(LAYOUT).cells[awake] == 1
    assert sum(Tally(LAYOUT).cells) == 1


def test_a_tally_that_goes_on_keeps_counters_and_resets_gauges():
    cells = array("d", [7.0] * LAYOUT.num_cells)
    tally = Tally(LAYOUT, cells)
    assert tally.cells[COUNTER] == 7
    assert tally.cells[HISTOGRAM.offset] == 7
    assert tally.cells[GAUGE] == 0


def test_without_statistics_only_gauges_are_kept():
    layout = build_layout(API_SERVER, Shape(num_engines=1, num_api_servers=1, max_model_len=100))
    tally = GaugesOnly(layout)
    tally.inc(layout.cell("wholebatch:received_tokens_total", engine="0"), 5)
    tally.observe(layout.histogram("vllm:request_prompt_tokens", engine="0"), 5)
    tally.set(layout.cell("wholebatch:api_server_requests_in_flight", engine="0"), 3)
    assert sum(tally.cells) == 3
