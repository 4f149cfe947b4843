"""The four Grafana dashboards, made from the catalogue; `DASHBOARDS` says which file each is. Pure.

*Overview* is for the person on call: is it well, who is hurt. *Iterations* shows what the engines ran, *Requests* what
clients saw, *Statistics plane* whether the numbers themselves can be trusted. The histograms of iterations and of
requests are taken from the catalogue, so that a new one has its heatmap by being declared.

The variable `instance` chooses deployments by their public address. A discovered target's `instance` has more behind
it, after a slash (`frontend.scrape.discovery`), and is chosen with its deployment. What is shown of an engine or a
process is never merged over instances: two deployments both have an engine 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from metrics.catalogue import API_SERVER, METRICS, SUPERVISOR, Kind, Metric, Scope
from metrics.catalogue import ENGINE as ENGINE_ROLE
from metrics.dashboards.panels import (
    BYTES,
    COUNT,
    PER_SECOND,
    RATIO,
    SECONDS,
    TOKENS_PER_SECOND,
    Panel,
    Query,
    Row,
    fact,
    heat,
    lines,
    number,
    put_together,
    states,
    variable,
)
from metrics.dashboards.promql import Queries

_JOB: Final = {"job": '=~"$job"'}
_INSTANCE: Final = {**_JOB, "instance": '=~"($instance)(/.*)?"'}
_MODEL: Final = {**_INSTANCE, "model_name": '="$model_name"'}
Q: Final = Queries(selection={**_MODEL, "engine": '=~"$engine"'}, window="$__rate_interval")

QUANTILES: Final = (0.5, 0.95, 0.99)
ITERATION_TOKENS: Final = "vllm:iteration_tokens_total"
TTFT, ITL = "vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds"
E2E: Final = "vllm:e2e_request_latency_seconds"
UNITS: Final = {"seconds": SECONDS}

_EXPORTED: Final = "wholebatch:exporter_up"
ENGINE: Final = ("instance", "engine")
ENGINE_LEGEND: Final = "{{instance}} engine {{engine}}"
_UP: Final = Q.gauge(_EXPORTED, *ENGINE, how="max")
_OF_JOB: Final = Queries(selection=_JOB, window="")
_OF_INSTANCE: Final = Queries(selection=_INSTANCE, window="")
_OF_MODEL: Final = Queries(selection=_MODEL, window="")
_DURATION: Final = "wholebatch:iteration_duration_seconds"
_CACHE_CONFIG: Final = ("kv_cache_size_tokens", "block_size", "num_gpu_blocks", "cache_dtype")
_CACHE_LEGEND: Final = "{{kv_cache_size_tokens}} tokens in {{num_gpu_blocks}} blocks of {{block_size}}, {{cache_dtype}}"
_PROCESS: Final = ("instance", "process")
_PROCESS_LEGEND: Final = "{{process}} {{instance}}"
_ROLE_TITLES: Final = {API_SERVER: "API servers", ENGINE_ROLE: "Engines", SUPERVISOR: "Supervisor"}


def overview() -> str:
    failed = Q.rate("vllm:request_success_total", finished_reason="error")
    ended = Q.rate("vllm:request_success_total")
    well = [
        number("Engines without an exporter", Query(f"count({_UP}) - sum({_UP})"), bad_above=0.5),
        number(
            "Laws broken, 1 h",
            Query(Q.over("increase", "wholebatch:audit_violations_total", window="1h")),
            bad_above=0.5,
        ),
        number(
            "Statistics faults, 1 h",
            Query(Q.over("increase", "wholebatch:bulkhead_errors_total", window="1h")),
            bad_above=0.5,
        ),
        number(
            "Engine restarts, 1 h",
            Query(f"sum(changes({Q.series('wholebatch:engine_incarnation')}[1h]))"),
            bad_above=0.5,
        ),
        number("Requests failed", Query(f"{failed} / ({ended} > 0) or {ended}"), unit=RATIO, bad_above=0.01),
        number("Time to first token, p95", Query(Q.quantile(0.95, TTFT)), unit=SECONDS, bad_above=1.0),
    ]
    hurt = [
        lines("Time to first token", *_quantiles(TTFT), unit=SECONDS),
        lines("Between two tokens", *_quantiles(ITL), unit=SECONDS),
        lines("Whole request", *_quantiles(E2E), unit=SECONDS),
        lines("Requests ended", _by("vllm:request_success_total", "finished_reason"), unit=PER_SECOND, stacked=True),
        lines("HTTP answers", _by("http_requests_total", "status"), unit=PER_SECOND, stacked=True),
        lines("Refused at the door", _by("vllm:admission_rejections_total", "reason"), unit=PER_SECOND),
    ]
    full = [
        lines(
            "Running and waiting",
            Query(Q.gauge("vllm:num_requests_running", *ENGINE), f"{ENGINE_LEGEND} runs"),
            Query(Q.gauge("vllm:num_requests_waiting", *ENGINE), f"{ENGINE_LEGEND} has waiting"),
        ),
        lines("KV cache in use", _per_engine("vllm:kv_cache_usage_perc", how="max"), unit=RATIO),
        lines(
            "Tokens",
            Query(Q.rate("vllm:prompt_tokens_total"), "prompt"),
            Query(Q.rate("vllm:generation_tokens_total"), "generated"),
            unit=TOKENS_PER_SECOND,
        ),
        lines("Waiting, by reason", _sum("vllm:num_requests_waiting_by_reason", "reason"), stacked=True),
        lines("In flight at API servers", Query(Q.gauge("wholebatch:api_server_requests_in_flight"), "sequences")),
        lines("Preemptions", _by("vllm:num_preemptions_total", "engine"), unit=PER_SECOND),
    ]
    rows = [Row("Is it well?", well), Row("Who is hurt?", hurt), Row("How full is it?", full)]
    return _dashboard("overview", "Overview", "For the person on call: is it well, and who is hurt.", rows)


def iterations() -> str:
    tokens = [
        heat("Tokens an iteration", Q.heat(ITERATION_TOKENS), span=12),
        heat("Requests an iteration", Q.heat("wholebatch:iteration_requests"), span=12),
        heat("Tokens an iteration, engine $engine", Q.heat(ITERATION_TOKENS), span=12, repeat="engine"),
    ]
    shown = (ITERATION_TOKENS, "wholebatch:iteration_requests")
    others = [m for m in histograms(Scope.ENGINE) if m.name not in shown]
    pace = [
        lines("Iterations", _by("wholebatch:iterations_total", "phase"), unit="suffix: iterations/s", stacked=True),
        lines("Tokens an iteration, mean", _mean(ITERATION_TOKENS), _mean(ITERATION_TOKENS, *ENGINE)),
        lines(
            "Requests an iteration, mean",
            _mean("wholebatch:iteration_requests"),
            _mean("wholebatch:iteration_requests", *ENGINE),
        ),
        lines("Duration, p50", Query(Q.quantile(0.5, _DURATION, "phase"), "{{phase}}"), unit=SECONDS),
        lines("Duration, p99", Query(Q.quantile(0.99, _DURATION, "phase"), "{{phase}}"), unit=SECONDS),
        lines(
            "Where the loops' time goes",
            _by("wholebatch:iteration_stage_seconds_total", "stage"),
            unit="suffix: s/s",
            stacked=True,
        ),
    ]
    work = [
        lines(
            "Prompt tokens, by source",
            _by("vllm:prompt_tokens_by_source_total", "source"),
            unit=TOKENS_PER_SECOND,
            stacked=True,
        ),
        lines("Computed tokens", *_computed(), unit=TOKENS_PER_SECOND, stacked=True),
        lines("Preemptions", _by("vllm:num_preemptions_total", "engine"), unit=PER_SECOND),
        lines(
            "Prefix cache: tokens found of those looked up",
            Query(
                f"{Q.rate('vllm:prefix_cache_hits_total', *ENGINE)} / "
                f"{Q.rate('vllm:prefix_cache_queries_total', *ENGINE)}",
                ENGINE_LEGEND,
            ),
            unit=RATIO,
        ),
        lines("KV cache in use", _per_engine("vllm:kv_cache_usage_perc", how="max"), unit=RATIO),
        fact("KV cache", Query(Q.gauge("vllm:cache_config_info", *_CACHE_CONFIG), _CACHE_LEGEND)),
    ]
    rows = [
        Row("What ran together", tokens),
        Row("Pace", pace),
        Row("Work", work),
        Row("Every other distribution", _heats(others)),
    ]
    return _dashboard("iterations", "Iterations", "What each engine ran, iteration by iteration, whole batches.", rows)


def requests() -> str:
    latency = [
        heat("Time to first token", Q.heat(TTFT), unit=SECONDS),
        heat("Between two tokens", Q.heat(ITL), unit=SECONDS),
        heat("Whole request", Q.heat(E2E), unit=SECONDS),
        lines("Time to first token", *_quantiles(TTFT), unit=SECONDS),
        lines("Between two tokens", *_quantiles(ITL), unit=SECONDS),
        lines("Time per output token", *_quantiles("vllm:request_time_per_output_token_seconds"), unit=SECONDS),
        lines("Where a request's time goes, mean", *_parts(), unit=SECONDS, stacked=True),
        lines("In the queue", *_quantiles("vllm:request_queue_time_seconds"), unit=SECONDS),
        lines("Inference", *_quantiles("vllm:request_inference_time_seconds"), unit=SECONDS),
    ]
    outcomes = [
        lines("Requests ended", _by("vllm:request_success_total", "finished_reason"), unit=PER_SECOND, stacked=True),
        lines(
            "Sequences ended", _by("wholebatch:sequences_ended_total", "finished_reason"), unit=PER_SECOND, stacked=True
        ),
        lines("Refused at the door", _by("vllm:admission_rejections_total", "reason"), unit=PER_SECOND),
        lines("Delivered", Query(Q.rate("wholebatch:delivered_tokens_total"), "delivered"), unit=TOKENS_PER_SECOND),
        lines(
            "Undelivered", _by("wholebatch:undelivered_tokens_total", "reason"), unit=TOKENS_PER_SECOND, stacked=True
        ),
        lines("HTTP answers", _by("http_requests_total", "handler"), unit=PER_SECOND, stacked=True),
    ]
    shown = (TTFT, ITL, E2E, "http_request_duration_seconds", "http_request_duration_highr_seconds")
    others = [m for m in histograms(Scope.REQUEST) if m.name not in shown and m.unit != "seconds"]
    times = [m for m in histograms(Scope.REQUEST) if m.name not in shown and m.unit == "seconds"]
    rows = [
        Row("Latency", latency),
        Row("Outcomes", outcomes),
        Row("Sizes", _heats(others)),
        Row("Times", _heats(times)),
    ]
    return _dashboard("requests", "Requests", "What clients saw: latencies, lengths and outcomes.", rows)


def statistics_plane() -> str:
    seen = f"timestamp({Q.series('wholebatch:exporter_term')})"
    exporter = [
        states("Exported", _per_engine("wholebatch:exporter_up", how="max")),
        states("Term of the grant", _per_engine("wholebatch:exporter_term", how="max")),
        states("Incarnation", _per_engine("wholebatch:engine_incarnation", how="max")),
        lines(
            "Since an engine's series were last exported",
            Query(f"time() - {Q.total('max', f'max_over_time({seen}[5m:1s])', ENGINE)}", ENGINE_LEGEND),
            unit=SECONDS,
        ),
        lines(
            "Snapshots",
            Query(Q.rate("wholebatch:snapshots_total", *ENGINE, "result"), f"{ENGINE_LEGEND} {{{{result}}}}"),
            unit=PER_SECOND,
        ),
        lines("Snapshots received too late", _by("wholebatch:stale_snapshots_total", "engine"), unit=PER_SECOND),
    ]
    audit = [
        lines("Laws found broken", Query(Q.over("increase", "wholebatch:audit_violations_total", ("law",)), "{{law}}")),
        lines("By how much", _sum("wholebatch:audit_imbalance_tokens", "law"), unit=COUNT),
        lines("Generated tokens, from engine to client", *_token_path(), unit=TOKENS_PER_SECOND),
        lines("Lost tokens", _by("wholebatch:lost_tokens_total", "reason"), unit=TOKENS_PER_SECOND),
        lines("Faults caught", _by("wholebatch:bulkhead_errors_total", "where"), unit=PER_SECOND),
        lines("Messages that did not parse", _by("wholebatch:wire_rejected_total", "kind"), unit=PER_SECOND),
    ]
    processes = [panel for role, title in _ROLE_TITLES.items() for panel in _processes(role, title)]
    rows = [Row("Who exports", exporter), Row("Does it add up?", audit), Row("Processes", processes)]
    return _dashboard("statistics-plane", "Statistics plane", "Whether the numbers themselves can be trusted.", rows)


def histograms(scope: Scope) -> list[Metric]:
    """The catalogue's histograms of one scope."""
    return [metric for metric in METRICS if metric.kind is Kind.HISTOGRAM and metric.scope is scope]


def _by(name: str, label: str) -> Query:
    if label == "engine":
        return Query(Q.rate(name, *ENGINE), ENGINE_LEGEND)
    return Query(Q.rate(name, label), f"{{{{{label}}}}}")


def _sum(name: str, label: str) -> Query:
    return Query(Q.gauge(name, label), f"{{{{{label}}}}}")


def _per_engine(name: str, how: str) -> Query:
    return Query(Q.gauge(name, *ENGINE, how=how), ENGINE_LEGEND)


def _processes(role: str, title: str) -> list[Panel]:
    """What the processes of one role use."""
    label = {"process": f'=~"{role}-.*"'}
    cpu = Q.rate("process_cpu_seconds_total", *_PROCESS, **label)
    memory = Q.gauge("process_resident_memory_bytes", *_PROCESS, **label)
    open_files = Q.gauge("process_open_fds", *_PROCESS, **label)
    return [
        lines(f"{title}: processor", Query(cpu, _PROCESS_LEGEND), unit="suffix: cores"),
        lines(f"{title}: memory", Query(memory, _PROCESS_LEGEND), unit=BYTES),
        lines(f"{title}: open files", Query(open_files, _PROCESS_LEGEND)),
    ]


def _quantiles(name: str) -> list[Query]:
    return [Query(Q.quantile(quantile, name), f"p{quantile * 100:g}") for quantile in QUANTILES]


def _mean(name: str, *by: str) -> Query:
    return Query(Q.mean(name, *by), ENGINE_LEGEND if by else "all")


def _heats(metrics: Sequence[Metric]) -> list[Panel]:
    return [heat(_title(metric), Q.heat(metric.name), unit=UNITS.get(metric.unit, COUNT)) for metric in metrics]


def _title(metric: Metric) -> str:
    words = metric.name.partition(":")[2].removesuffix("_total").removesuffix("_seconds").replace("_", " ")
    return words[:1].upper() + words[1:]


def _computed() -> list[Query]:
    return [
        Query(Q.rate("wholebatch:prompt_tokens_computed_total"), "prompt"),
        Query(Q.rate("wholebatch:recomputed_tokens_total"), "recomputed after preemption"),
        Query(Q.rate("vllm:generation_tokens_total"), "generated"),
    ]


def _parts() -> list[Query]:
    return [Query(Q.mean(f"vllm:request_{part}_time_seconds"), part) for part in ("queue", "prefill", "decode")]


def _token_path() -> list[Query]:
    return [
        Query(Q.rate("vllm:generation_tokens_total"), "generated"),
        Query(Q.rate("wholebatch:tokens_sent_total"), "sent"),
        Query(Q.rate("wholebatch:received_tokens_total"), "received"),
        Query(Q.rate("wholebatch:delivered_tokens_total"), "delivered"),
        Query(Q.rate("wholebatch:undelivered_tokens_total"), "undelivered"),
    ]


def _dashboard(name: str, title: str, description: str, rows: Sequence[Row]) -> str:
    chosen = [
        variable("job", "Job", f"label_values({_EXPORTED}, job)", multi=True),
        variable(
            "instance",
            "Deployment",
            f"label_values({_OF_JOB.series(_EXPORTED)}, instance)",
            multi=True,
            part="/^([^/]+)/",
        ),
        variable("model_name", "Model", f"label_values({_OF_INSTANCE.series(_EXPORTED)}, model_name)"),
        variable("engine", "Engine", f"label_values({_OF_MODEL.series(_EXPORTED)}, engine)", multi=True),
    ]
    return put_together(f"wholebatch-{name}", f"wholebatch: {title}", description, chosen, rows)


DASHBOARDS: Final = {
    "overview.json": overview,
    "iterations.json": iterations,
    "requests.json": requests,
    "statistics-plane.json": statistics_plane,
}
