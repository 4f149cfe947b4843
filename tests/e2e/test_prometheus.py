"""A real Prometheus scrapes a running deployment: every query of every dashboard, every rule and every query of vLLM's
own dashboards finds data."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from metrics.catalogue import METRICS, Kind, Scope
from metrics.dashboards import provisioning
from metrics.dashboards.promql import SUFFIXES, TARGET_LABELS
from tests.e2e.harness import Served, served, total, wait_for
from tests.e2e.load import asks, run
from tests.e2e.prometheus import (
    GRAFANA,
    Prometheus,
    dashboard_targets,
    fill_in,
    needs_prometheus,
    now,
    prometheus,
)

pytestmark = needs_prometheus

MODEL = "tiny"
PUBLIC, DISCOVERED = "public", "discovered"  # the jobs
WINDOW = "1m"
OF_TARGET = ("__name__", *TARGET_LABELS)
# What an idle engine and its API servers go on counting.
MOVING = ("wholebatch:snapshots_total", "wholebatch:stale_snapshots_total", "wholebatch:iteration_stage_seconds_total")

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
    with served(tiny_model, *flags, *scarce) as deployment, prometheus(scrape_configs(deployment)) as server:
        server.wait_for_scrape(now())
        everything_happens(deployment)
        server.wait_for_scrape(now())
        yield Observed(deployment, server)


def scrape_configs(deployment: Served) -> list[dict[str, Any]]:
    """Both ways to scrape, as the generated configurations have them, each as a job of its own."""
    found = []
    for job, name in ((PUBLIC, "prometheus.yml"), (DISCOVERED, "prometheus-discovered.yml")):
        text = (GRAFANA / name).read_text().replace(provisioning.PUBLIC, deployment.url.removeprefix("http://"))
        (config,) = yaml.safe_load(text)["scrape_configs"]
        found.append({**config, "job_name": job})
    return found


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


@pytest.mark.parametrize("job", [PUBLIC, DISCOVERED])
def test_every_query_of_every_dashboard_finds_data(observed: Observed, job: str):
    targets = dashboard_targets()
    assert len({target.dashboard for target in targets}) == 4
    queries = [
        fill_in(target.expression, model_name=MODEL, interval=WINDOW, engine=engine, job=job)
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


def cumulative_series() -> list[str]:
    """The names of every counter's and histogram's series of engine and request scope."""
    metrics = [m for m in METRICS if m.scope in (Scope.ENGINE, Scope.REQUEST) and m.kind is not Kind.GAUGE]
    return [metric.name + suffix for metric in metrics for suffix in SUFFIXES[metric.kind]]


def counted(server: Prometheus, job: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """All of them that rest while nothing runs, summed over the job's targets."""
    sums: dict[tuple[str, frozenset[tuple[str, str]]], float] = defaultdict(float)
    for name in cumulative_series():
        if name not in MOVING:
            for labels, value in server.query(f'{name}{{job="{job}"}}').items():
                sums[name, frozenset(kv for kv in labels if kv[0] not in OF_TARGET)] += value
    return dict(sums)


def both_counted(server: Prometheus) -> tuple[Any, Any] | None:
    """By both jobs, once both have all series: those of an engine are absent while its exporter moves."""
    public, discovered = counted(server, PUBLIC), counted(server, DISCOVERED)
    has_engines = all(
        any(name.startswith("vllm:iteration") and ("engine", engine) in labels for name, labels in public)
        for engine in ("0", "1")
    )
    return (public, discovered) if has_engines and public.keys() == discovered.keys() else None


def test_the_discovered_targets_sum_to_the_public_port_also_across_a_move_of_the_exporter(observed: Observed):
    deployment, server = observed
    for is_moved in (False, True):
        if is_moved:
            move_the_exporter(deployment)
        samples = deployment.idle_metrics()
        server.wait_for_scrape(now())
        public, discovered = wait_for(lambda: both_counted(server), "the same series from both jobs", 20.0)
        assert len(public) > 500
        assert discovered == pytest.approx(public, rel=1e-9)  # sums of seconds, to rounding
        key = ("vllm:iteration_tokens_total_count", frozenset({("model_name", MODEL), ("engine", "0")}))
        assert public[key] == total(samples, key[0], {"engine": "0"}) > 0
    fell = [name for name in cumulative_series() if server.query(f"sum(resets({name}[5m])) > 0")]
    assert fell == []


def test_two_deployments_in_one_prometheus_stay_two_either_way_they_are_scraped(tiny_model: Path):
    generated = "vllm:generation_tokens_total"
    with served(tiny_model) as first, served(tiny_model) as second, prometheus(two(first, second)) as server:
        server.wait_for_scrape(now())
        for _ in range(6):
            for deployment, num_tokens in ((first, 40), (second, 10)):
                deployment.complete([40, 41, 42], num_tokens)
            server.wait_for_scrape(now())
        truth = {one.url.removeprefix("http://"): total(one.idle_metrics(), generated) for one in (first, second)}
        server.wait_for_scrape(now())
        for job in (PUBLIC, DISCOVERED):
            selected = f'{generated}{{job="{job}"}}'
            assert set(server.query(f"resets({selected}[5m])").values()) == {0.0}
            counted_by = {dict(labels)["instance"]: value for labels, value in server.query(selected).items()}
            assert {instance.partition("/")[0]: value for instance, value in counted_by.items()} == truth
            (increase,) = server.query(f"sum(increase({selected}[5m]))").values()
            assert increase == pytest.approx(sum(truth.values()), rel=0.2)  # Prometheus extrapolates
    assert sorted(truth.values()) == [60, 240]


def two(first: Served, second: Served) -> list[dict[str, Any]]:
    """Both deployments in one job each way."""
    jobs = [scrape_configs(deployment) for deployment in (first, second)]
    for merged, other in zip(*jobs, strict=True):
        for key in ("static_configs", "http_sd_configs"):
            merged.get(key, []).extend(other.get(key, []))
    return jobs[0]


def move_the_exporter(deployment: Served) -> None:
    """Kills the API server that exports engine 0, and serves until all is up again."""

    def grant() -> dict[str, Any]:
        (found,) = [one["grant"] for one in deployment.deployment()["exporters"] if one["engine"] == 0]
        return dict(found or {"term": []})

    before = grant()
    os.kill(deployment.pids("api-server")[before["api_server"]], signal.SIGKILL)
    wait_for(lambda: grant()["term"] > before["term"], "another exporter", 20.0)
    wait_for(lambda: all(p["state"] == "ready" for p in deployment.deployment()["processes"][1:]), "all ready", 20.0)
    run(deployment, asks(8, prompt_tokens=(20, 60), max_tokens=20, vocab=250, seed=1), at_a_time=8)


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
