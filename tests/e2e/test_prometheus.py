"""A real Prometheus scrapes a running deployment: every query of every dashboard, every rule and every query of vLLM's
own dashboards finds data."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.e2e.harness import Served, served, total, wait_for
from tests.e2e.load import asks, run
from tests.e2e.prometheus import (
    Prometheus,
    dashboard_targets,
    fill_in,
    needs_prometheus,
    now,
    prometheus,
)

pytestmark = needs_prometheus

MODEL = "tiny"
WINDOW = "1m"

# Source: the dashboards in vLLM's repository, examples/observability (grafana.json, query_statistics.json,
# performance_statistics.json): their queries as they stand there, with the names of histograms put in.
VLLM_HISTOGRAMS = (
    "e2e_request_latency_seconds",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_max_num_generation_tokens",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "iteration_tokens_total",
)
VLLM_HISTOGRAM_QUERIES = (
    'histogram_quantile(0.99, sum by(le) (rate(vllm:%s_bucket{model_name="$model_name"}[$__rate_interval])))',
    "histogram_quantile(0.90, sum by(le, model_name) "
    '(rate(vllm:%s_bucket{model_name=~"$model_name"}[$__rate_interval])))',
    'rate(vllm:%s_sum{model_name="$model_name"}[$__rate_interval])\n/\n'
    'rate(vllm:%s_count{model_name="$model_name"}[$__rate_interval])',
    'sum by(le) (increase(vllm:%s_bucket{model_name="$model_name"}[$__rate_interval]))',
    'rate(vllm:%s_sum{model_name="$model_name"}[$__rate_interval])',
)
VLLM_QUERIES = (
    'rate(vllm:prompt_tokens_total{model_name="$model_name"}[$__rate_interval])',
    'rate(vllm:generation_tokens_total{model_name="$model_name"}[$__rate_interval])',
    'sum(rate(vllm:prompt_tokens_total{model_name=~"$model_name"}[$__rate_interval]))\n/\n'
    'sum(rate(vllm:request_success_total{model_name=~"$model_name"}[$__rate_interval]))',
    'sum by(finished_reason) (increase(vllm:request_success_total{model_name="$model_name"}[$__rate_interval]))',
    'vllm:num_requests_running{model_name="$model_name"}',
    'vllm:num_requests_waiting{model_name="$model_name"}',
    'vllm:kv_cache_usage_perc{model_name="$model_name"}',
)


class Observed(NamedTuple):
    """A deployment that has seen every kind of request, and the Prometheus that watched it."""

    deployment: Served
    prometheus: Prometheus


@pytest.fixture(scope="module")
def observed(tiny_model: Path) -> Iterator[Observed]:
    flags = ("--api-server-count", "2", "--data-parallel-size", "2", "--served-model-name", MODEL)
    scarce = ("--num-gpu-blocks-override", "40", "--max-model-len", "512")
    with served(tiny_model, *flags, *scarce) as deployment:
        public = {"job_name": "wholebatch", "static_configs": [{"targets": [deployment.url.removeprefix("http://")]}]}
        with prometheus([public]) as server:
            server.wait_for_scrape(now())
            everything_happens(deployment)
            server.wait_for_scrape(now())
            yield Observed(deployment, server)


def everything_happens(deployment: Served) -> None:
    """Streams that need more KV blocks than there are, clients that leave, cached prompts, chats, a bad request."""
    requests = asks(48, prompt_tokens=(60, 150), max_tokens=60, vocab=250)
    leaving = [dataclasses.replace(ask, leaves_after_chunks=5) for ask in requests[:6]]
    run(deployment, [*leaving, *requests[6:]], at_a_time=16)
    for _ in range(4):
        deployment.complete(list(range(40, 110)), 4)
        status, _ = deployment.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]})
        assert status == 200
    assert deployment.post("/v1/completions", {"prompt": [], "max_tokens": "many"})[0] == 400
    samples = deployment.idle_metrics()
    assert total(samples, "vllm:num_preemptions_total") > 0
    assert total(samples, "vllm:prefix_cache_hits_total") > 0
    assert total(samples, "vllm:request_success_total", {"finished_reason": "abort"}) == 6


def without_data(server: Prometheus, queries: Iterable[str]) -> list[str]:
    """The queries that find nothing. Each has a while: engine series are absent while an exporter moves."""
    left = list(queries)

    def is_done() -> bool:
        left[:] = [query for query in left if not server.query(query)]
        return not left

    with suppress(AssertionError):
        wait_for(is_done, "data for every query", 10.0)
    return left


def test_every_query_of_every_dashboard_finds_data(observed: Observed):
    targets = dashboard_targets()
    assert len({target.dashboard for target in targets}) == 4
    queries = [
        fill_in(target.expression, model_name=MODEL, interval=WINDOW, engine=engine)
        for target in targets
        for engine in (("0", "1") if "repeat" in target.panel else (".*",))
    ]
    assert without_data(observed.prometheus, queries) == []


def test_every_variable_of_a_dashboard_has_values(observed: Observed):
    for label in ("job", "model_name", "engine"):
        assert observed.prometheus.get(f"label/{label}/values", **{"match[]": "wholebatch:exporter_up"})


def test_every_query_of_vllms_dashboards_finds_data_unmodified(observed: Observed):
    queries = [q.replace("%s", name) for q in VLLM_HISTOGRAM_QUERIES for name in VLLM_HISTOGRAMS]
    filled = [fill_in(query, model_name=MODEL, interval=WINDOW) for query in (*queries, *VLLM_QUERIES)]
    assert without_data(observed.prometheus, filled) == []


def test_every_recording_rule_has_data_and_every_alert_evaluates(observed: Observed):
    rules = [rule for group in observed.prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert rules
    assert [(rule["name"], rule["lastError"]) for rule in rules if rule["health"] != "ok"] == []
    recorded = [rule["name"] for rule in rules if rule["type"] == "recording"]
    assert without_data(observed.prometheus, recorded) == []


def test_prometheus_sees_the_figures_that_the_deployment_gives(observed: Observed):
    samples = observed.deployment.idle_metrics()
    observed.prometheus.wait_for_scrape(now())
    names = ("vllm:iteration_tokens_total_count", "wholebatch:delivered_tokens_total", "vllm:generation_tokens_total")
    for name in names:
        assert observed.prometheus.query(f"sum({name})") == {frozenset(): total(samples, name)}


def test_promtool_complains_of_nothing_but_vllms_own_naming(observed: Observed):
    text = observed.deployment.get("/metrics")
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=30)
    complaints = (done.stdout + done.stderr).splitlines()
    assert complaints, "promtool reads no metrics"
    assert [line for line in complaints if not is_vllms_naming(line)] == []


def is_vllms_naming(complaint: str) -> bool:
    """Colons separate vLLM's prefix, and ours beside it; one of vLLM's histograms is called like a counter."""
    return complaint.endswith("metric names should not contain ':'") or complaint == (
        'vllm:iteration_tokens_total non-counter metrics should not have "_total" suffix'
    )
