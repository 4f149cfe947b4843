"""What is said of the time between two scrapes, against direct computation; and what is not said."""

from __future__ import annotations

import bisect
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from metrics.top.window import START, Scrape, Window, divide, per_bucket, quantile

BOUNDS = st.lists(st.floats(0.001, 1000), min_size=1, max_size=8, unique=True).map(sorted)
OBSERVATIONS = st.lists(st.floats(0.0001, 2000), min_size=1, max_size=40)
QUANTILES = st.floats(0.01, 1)


def labelled(**labels: str) -> frozenset[tuple[str, str]]:
    return frozenset(labels.items())


def scrape(at: float, **values: float) -> Scrape:
    return Scrape({(name, labelled()): value for name, value in values.items()}, at)


def cumulative(observations: list[float], bounds: list[float]) -> list[tuple[float, float]]:
    return [(bound, float(sum(o <= bound for o in observations))) for bound in [*bounds, math.inf]]


@example(observations=[1.0, 1.0, 1.0, 86.0, 86.0, 86.0], bounds=[85.91569098170763], q=0.5)
@given(observations=OBSERVATIONS, bounds=BOUNDS, q=QUANTILES)
def test_a_quantile_is_estimated_in_the_bucket_where_the_observation_of_that_rank_is(observations, bounds, q):
    rank = max(1, math.ceil(q * len(observations) - 1e-9))
    wanted = sorted(observations)[rank - 1]
    place = bisect.bisect_left(bounds, wanted)
    estimate = quantile(q, cumulative(observations, bounds))
    assert estimate is not None
    if place == len(bounds):
        assert estimate == bounds[-1], "above the greatest bound nothing is known"
    else:
        assert (0.0 if place == 0 else bounds[place - 1]) <= estimate <= bounds[place]


@given(observations=OBSERVATIONS, bounds=BOUNDS, first=QUANTILES, second=QUANTILES)
def test_a_greater_quantile_is_no_smaller(observations, bounds, first, second):
    buckets = cumulative(observations, bounds)
    low, high = (quantile(q, buckets) for q in sorted((first, second)))
    assert low is not None
    assert high is not None
    assert low <= high * (1 + 1e-12)


def test_observations_are_taken_to_lie_evenly_in_their_bucket():
    buckets = [(1.0, 0.0), (2.0, 4.0), (4.0, 8.0), (math.inf, 8.0)]
    assert [quantile(q, buckets) for q in (0.25, 0.5, 0.75, 1.0)] == [1.5, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("buckets", [[], [(1.0, 0.0), (math.inf, 0.0)]])
def test_nothing_observed_has_no_quantile(buckets):
    assert quantile(0.5, buckets) is None


@given(observations=OBSERVATIONS, bounds=BOUNDS)
def test_buckets_taken_alone_hold_every_observation_once(observations, bounds):
    assert sum(count for _, count in per_bucket(cumulative(observations, bounds))) == len(observations)


def test_a_rate_is_the_increase_over_the_time_between_summed_over_series():
    name, zero, one = "c_total", labelled(engine="0"), labelled(engine="1")
    window = Window(
        Scrape({(name, zero): 10.0, (name, one): 100.0}, 5.0), Scrape({(name, zero): 14.0, (name, one): 106.0}, 7.0)
    )
    assert window.rate(name) == 5.0
    assert window.rate(name, engine="0") == 2.0
    assert window.increases(name) == {zero: 4.0, one: 6.0}


def test_the_quantile_of_a_window_is_of_what_was_observed_in_it():
    name, below, above = "h_bucket", labelled(le="1.0"), labelled(le="+Inf")
    before = Scrape({(name, below): 1000.0, (name, above): 1000.0}, 0.0)
    after = Scrape({(name, below): 1000.0, (name, above): 1010.0}, 1.0)
    assert Window(before, after).buckets("h") == [(1.0, 0.0), (math.inf, 10.0)]


def test_a_count_that_fell_has_no_rate():
    assert Window(scrape(0, c_total=100), scrape(1, c_total=3)).rate("c_total") is None


def test_a_series_that_has_only_just_appeared_has_no_rate():
    appeared = Window(scrape(0, other=1), scrape(1, c_total=5000))
    assert appeared.rate("c_total") is None
    assert appeared.gauge("c_total") == 5000


def test_another_deployment_at_the_same_address_has_no_rate_against_the_first():
    start = (START, labelled(process="supervisor-0"))
    name = ("c_total", labelled())
    first, second = Scrape({start: 1.0, name: 5.0}, 0.0), Scrape({start: 2.0, name: 5000.0}, 1.0)
    assert Window(first, second).rate("c_total") is None
    assert Window(first, Scrape({start: 1.0, name: 7.0}, 1.0)).rate("c_total") == 2.0


def test_without_an_earlier_scrape_only_the_present_is_known():
    window = Window(None, scrape(1, c_total=5))
    assert (window.gauge("c_total"), window.rate("c_total"), window.seconds) == (5, None, 0)


def test_the_mean_of_no_observation_is_not_known():
    same = {"h_sum": 4.0, "h_count": 2.0}
    assert Window(scrape(0, **same), scrape(1, **same)).mean("h") is None
    assert Window(scrape(0, **same), scrape(1, h_sum=10.0, h_count=5.0)).mean("h") == 2.0


@pytest.mark.parametrize(("part", "whole"), [(None, 1.0), (1.0, None), (1.0, 0.0), (0.0, 0.0)])
def test_what_cannot_be_divided_is_not_known(part, whole):
    assert divide(part, whole) is None
