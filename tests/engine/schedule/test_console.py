"""The console's line, from a tally and a clock that are made up."""

from __future__ import annotations

import pytest

from engine.schedule.console import INTERVAL_S, Console
from metrics.tally import Tally
from tests.engine.engine_processes import engine_layout

COUNTERS = {
    "vllm:prompt_tokens_total": 300,
    "vllm:generation_tokens_total": 50,
    "vllm:num_preemptions_total": 2,
    "vllm:prefix_cache_queries_total": 400,
    "vllm:prefix_cache_hits_total": 100,
}


@pytest.fixture
def tally() -> Tally:
    return Tally(engine_layout())


def work(tally: Tally) -> None:
    for name, number in COUNTERS.items():
        tally.inc(tally.layout.cell(name), number)


def test_the_line_says_what_grew_since_the_last_one_and_how_things_stand(tally: Tally):
    work(tally)  # before the console began: an earlier incarnation's
    console = Console(tally, now=100.0)
    work(tally)
    tally.set(tally.layout.cell("vllm:num_requests_running"), 3)
    tally.set(tally.layout.cell("vllm:num_requests_waiting"), 4)
    tally.set(tally.layout.cell("vllm:kv_cache_usage_perc"), 0.125)
    expected = (
        "event=stats prompt_tokens_per_s=15.0 generation_tokens_per_s=2.5 running=3 waiting=4"
        " kv_cache_usage_pct=12.5 prefix_cache_hit_rate_pct=25.0 preemptions=2"
    )
    assert console.line(120.0) == expected
    idle = console.line(130.0)
    assert idle is not None, "sequences wait, so there is something to say"
    assert "prompt_tokens_per_s=0.0" in idle
    assert "prefix_cache" not in idle, "nothing was looked up"


def test_there_is_no_line_before_its_time_and_nothing_that_grew_is_left_out(tally: Tally):
    console = Console(tally, now=100.0)
    work(tally)
    assert console.line(100.0 + INTERVAL_S - 0.01) is None
    work(tally)
    line = console.line(100.0 + INTERVAL_S)
    assert line is not None
    assert "prompt_tokens_per_s=60.0" in line


def test_an_idle_engine_says_nothing(tally: Tally):
    console = Console(tally, now=100.0)
    for turn in range(1, 5):
        assert console.line(100.0 + turn * INTERVAL_S) is None
    work(tally)
    line = console.line(100.0 + 5 * INTERVAL_S)
    assert line is not None
    assert "prompt_tokens_per_s=30.0" in line, "of the last ten seconds, not of the idle time before"
