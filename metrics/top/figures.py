"""What `metrics.top` shows, worked out from a window between two scrapes and the deployment's table. Pure.

Every figure may be None: not known. Rates and means are of the window, the rest is of its end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Final

from metrics.catalogue import PHASES
from metrics.top.window import Bucket, Scrape, Window, divide, per_bucket, quantile

QUANTILES: Final = (0.5, 0.9, 0.99)
LATENCIES: Final = (
    ("TTFT", "vllm:time_to_first_token_seconds"),
    ("ITL", "vllm:inter_token_latency_seconds"),
    ("queue", "vllm:request_queue_time_seconds"),
    ("prefill", "vllm:request_prefill_time_seconds"),
    ("end to end", "vllm:e2e_request_latency_seconds"),
)
ITERATION_TOKENS: Final = "vllm:iteration_tokens_total"
IN_FLIGHT: Final = "wholebatch:api_server_requests_in_flight"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessFigures:
    """What is shown of one process."""

    index: int
    state: str
    incarnation: int
    pid: int
    cpu: float | None  # cores
    resident_bytes: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFigures:
    """What is shown of one engine."""

    process: ProcessFigures
    exporter: str  # who holds the grant, and its term
    running: float | None
    waiting: float | None
    kv_usage: float | None  # 0 to 1
    generated_per_s: float | None
    iterations_per_s: float | None
    tokens_per_iteration: float | None
    seconds_per_iteration: float | None
    phases: Mapping[str, float] | None  # shares of the iterations
    preemptions: float | None
    cache_hits: float | None  # share of the prompt tokens looked up


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFigures:
    """What is shown of one API server, by its own admin port."""

    process: ProcessFigures
    is_silent: bool  # its admin port takes connections and does not answer
    in_flight: float | None
    requests_per_s: float | None
    delivered_per_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyFigures:
    """One latency over all engines and API servers, in seconds."""

    what: str
    quantiles: tuple[float | None, ...]  # as QUANTILES
    finest: float  # the lowest bucket's bound: what is below it cannot be told apart
    mean: float | None
    count: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One frame."""

    model: str
    window_s: float
    engines: Sequence[EngineFigures]
    servers: Sequence[ServerFigures]
    iteration_buckets: Sequence[Bucket]  # iterations by their tokens: (upper bound, how many)
    latencies: Sequence[LatencyFigures]
    generated_per_s: float | None  # by the engines
    computed_per_s: float | None  # prompt tokens, by the engines
    delivered_per_s: float | None  # to clients
    finished: Mapping[str, float] | None  # requests, by reason
    laws: Mapping[str, tuple[float, float]]  # of the audit: (imbalance now, violations ever)


def work_out(
    window: Window, own: Mapping[int, Window], table: Mapping[str, Any], silent: Set[int] = frozenset()
) -> Figures:
    """`own` has the windows of the API servers' admin ports, by index, `silent` the API servers that do not answer;
    `table` is what /deployment says."""
    facts = table.get("facts") or {}
    exporters = {row["engine"]: row["grant"] for row in table.get("exporters", ())}
    rows = sorted(table.get("processes", ()), key=lambda row: row["index"])
    engines = [row for row in rows if row["role"] == "engine"]
    servers = [row for row in rows if row["role"] == "api-server"]
    return Figures(
        model=str(facts.get("model_name", "")),
        window_s=window.seconds,
        engines=[_engine(window, row, exporters.get(row["index"])) for row in engines],
        servers=[_server(window, own.get(row["index"]), row, is_silent=row["index"] in silent) for row in servers],
        iteration_buckets=per_bucket(window.buckets(ITERATION_TOKENS)),
        latencies=[_latency(window, what, name) for what, name in LATENCIES],
        generated_per_s=window.rate("vllm:generation_tokens_total"),
        computed_per_s=window.rate("wholebatch:prompt_tokens_computed_total"),
        delivered_per_s=window.rate("wholebatch:delivered_tokens_total"),
        finished=_by_label(window, "vllm:request_success_total", "finished_reason"),
        laws=_laws(window.later),
    )


def _process(window: Window, row: Mapping[str, Any]) -> ProcessFigures:
    name = f"{row['role']}-{row['index']}"
    return ProcessFigures(
        index=row["index"],
        state=row["state"],
        incarnation=row["incarnation"],
        pid=row["pid"],
        cpu=window.rate("process_cpu_seconds_total", process=name),
        resident_bytes=window.gauge("process_resident_memory_bytes", process=name),
    )


def _engine(window: Window, row: Mapping[str, Any], grant: Mapping[str, Any] | None) -> EngineFigures:
    engine = str(row["index"])
    phases = _by_label(window, "wholebatch:iterations_total", "phase", engine=engine)
    num_iterations = sum(phases.values()) if phases else None
    shares = {phase: phases.get(phase, 0.0) / num_iterations for phase in PHASES} if phases and num_iterations else None
    hits = window.increase("vllm:prefix_cache_hits_total", engine=engine)
    is_exported = bool(window.gauge("wholebatch:exporter_up", engine=engine))
    return EngineFigures(
        process=_process(window, row),
        exporter=_exporter(grant) if is_exported else "nobody",
        running=window.gauge("vllm:num_requests_running", engine=engine),
        waiting=window.gauge("vllm:num_requests_waiting", engine=engine),
        kv_usage=window.gauge("vllm:kv_cache_usage_perc", engine=engine),
        generated_per_s=window.rate("vllm:generation_tokens_total", engine=engine),
        iterations_per_s=divide(num_iterations, window.seconds),
        tokens_per_iteration=window.mean(ITERATION_TOKENS, engine=engine),
        seconds_per_iteration=window.mean("wholebatch:iteration_duration_seconds", engine=engine),
        phases=shares,
        preemptions=window.increase("vllm:num_preemptions_total", engine=engine),
        cache_hits=divide(hits, window.increase("vllm:prefix_cache_queries_total", engine=engine)),
    )


def _exporter(grant: Mapping[str, Any] | None) -> str:
    if grant is None:
        return "another"  # the API server that answered has not heard the grant yet
    return f"{grant['api_server']} term {'.'.join(map(str, grant['term']))}"


def _server(window: Window, own: Window | None, row: Mapping[str, Any], *, is_silent: bool) -> ServerFigures:
    return ServerFigures(
        process=_process(window, row),
        is_silent=is_silent,
        in_flight=None if own is None else own.gauge(IN_FLIGHT),
        requests_per_s=None if own is None else own.rate("http_requests_total"),
        delivered_per_s=None if own is None else own.rate("wholebatch:delivered_tokens_total"),
    )


def _latency(window: Window, what: str, name: str) -> LatencyFigures:
    buckets = window.buckets(name)
    return LatencyFigures(
        what=what,
        quantiles=tuple(quantile(q, buckets) for q in QUANTILES),
        finest=buckets[0][0] if buckets else 0.0,
        mean=window.mean(name),
        count=window.increase(f"{name}_count"),
    )


def _by_label(window: Window, name: str, label: str, **labels: str) -> dict[str, float] | None:
    """Sum a counter's increases by one label."""
    increases = window.increases(name, **labels)
    if increases is None:
        return None
    found: dict[str, float] = {}
    for key, grown in increases.items():
        value = dict(key).get(label, "")
        found[value] = found.get(value, 0.0) + grown
    return found


def _laws(scrape: Scrape) -> dict[str, tuple[float, float]]:
    imbalance, violations = "wholebatch:audit_imbalance_tokens", "wholebatch:audit_violations_total"
    laws = scrape.values(violations, "law")
    return {
        law: (scrape.total(imbalance, [("law", law)]) or 0.0, scrape.total(violations, [("law", law)]) or 0.0)
        for law in laws
    }
