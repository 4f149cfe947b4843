"""The scraper that trusts nothing can itself be trusted: it sees what it is there to see."""

from __future__ import annotations

import pytest

from tests.e2e.watch import WITNESS, Findings, Look, TwiceError, Watch, read

KEY = f'{WITNESS}{{engine="0",model_name="m"}}'


def looks(*spans: tuple[float, bool]) -> Findings:
    """One look each tenth of a second, begun at these instants."""
    findings = Findings()
    findings.looks["0"] = [Look(began, began + 0.05, is_there) for began, is_there in spans]
    return findings


def test_a_series_that_stands_twice_in_one_answer_is_an_error():
    assert read('# TYPE a counter\na{x="1"} 2\na{x="2"} 3') == {'a{x="1"}': 2.0, 'a{x="2"}': 3.0}
    with pytest.raises(TwiceError):
        read('a{x="1"} 2\na{x="1"} 2')


def test_an_absence_is_from_the_last_scrape_with_the_series_to_the_next():
    seen = looks((0.0, True), (0.1, False), (0.2, False), (0.3, True), (0.4, True))
    assert seen.longest_absence_s("0") == pytest.approx(0.3)
    assert seen.gone_after_s("0", 0.0) == 0.0
    assert seen.back_after_s("0", 0.0) == pytest.approx(0.35)
    assert seen.longest_absence_s("0", since=0.35) == 0.0


def test_series_that_never_went_or_never_came_back_are_told_apart():
    assert looks((0.0, True), (0.1, True)).back_after_s("0", 0.0) == 0.0
    assert looks((0.0, True), (0.1, True)).gone_after_s("0", 0.0) is None
    assert looks((0.0, True), (0.1, False)).back_after_s("0", 0.0) is None
    assert looks((0.0, True), (0.1, True), (0.2, False)).gone_after_s("0", 0.0) == pytest.approx(0.1)


@pytest.fixture
def watch() -> Watch:
    """One that scrapes nothing: answers are judged by hand."""
    made = Watch.__new__(Watch)
    made.findings, made._highest, made._num_engines, made._lease_s = Findings(), {}, 1, 0.6
    made._published = {0: ([10.0], [5.0])}  # at 10 s the engine broadcast 5 tokens
    return made


def test_a_counter_that_falls_is_seen_and_a_gauge_may(watch: Watch):
    watch._judge({KEY: 5.0, 'vllm:num_requests_running{engine="0"}': 3.0}, began=10.1)
    watch._judge({KEY: 4.0, 'vllm:num_requests_running{engine="0"}': 1.0}, began=10.2)
    assert len(watch.findings.fell) == 1
    watch._judge({KEY: 5.0}, began=10.3)
    assert len(watch.findings.fell) == 1


def test_a_value_older_than_what_was_broadcast_a_lease_before_is_stale(watch: Watch):
    watch._judge({KEY: 3.0}, began=10.5)
    assert watch.findings.stale == []
    watch._judge({KEY: 4.0}, began=10.7)
    assert len(watch.findings.stale) == 1
    watch._judge({KEY: 5.0}, began=10.8)
    assert len(watch.findings.stale) == 1
