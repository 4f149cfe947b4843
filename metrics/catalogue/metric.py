"""What a metric's declaration consists of, and the label values that are known when a deployment starts. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple


class Kind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"
    SUMMARY = "summary"  # a count and a sum, no quantiles


class Scope(StrEnum):
    """Which process counts a metric, and of what."""

    ENGINE = "engine"  # each engine; its exporter exports it
    REQUEST = "request"  # each API server; summed over them on the public port
    PROCESS = "process"  # every process; label `process` on the public port
    AUDIT = "audit"  # the supervisor; otherwise as PROCESS
    HOOK = "hook"  # our part of a process of vLLM's; label `process`
    SCRAPE = "scrape"  # whoever answers a scrape, while answering; in no tally


class Label(NamedTuple):
    """A label beyond model_name and engine. `values` is None where a deployment's shape says them (the indices of
    its API servers), and in SCRAPE scope, where the answer does."""

    name: str
    values: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One metric family, under the name that it is exposed with (counters end in `_total`)."""

    name: str
    kind: Kind
    scope: Scope
    help: str
    unit: str = ""  # said in tables and dashboards; in the name where it is part of it
    labels: tuple[Label, ...] = ()
    buckets: str | None = None  # family in BUCKETS
    has_model: bool = True
    has_engine: bool = True
    starts_at_one: tuple[str, ...] = ()  # label values of a gauge that is 1 before anybody sets it


ENGINE: Final = "engine"
API_SERVER: Final = "api-server"
SUPERVISOR: Final = "supervisor"
ROLES: Final = (ENGINE, API_SERVER, SUPERVISOR)  # of processes
VLLM_ENGINE: Final = "vllm-engine"  # the same inside vLLM
VLLM_API_SERVER: Final = "vllm-api-server"

FINISHED_REASONS: Final = ("stop", "length", "abort", "error", "repetition")
ENDED_REASONS: Final = (*FINISHED_REASONS, "server_lost")
UNDELIVERED_REASONS: Final = ("disconnect", "stop", "error", "server_lost")
LOST_REASONS: Final = ("server_lost", "engine_lost")
REJECTION_REASONS: Final = ("max_num_queued_reqs", "max_num_queued_tokens")
WAITING_REASONS: Final = ("capacity", "deferred")
PHASES: Final = ("prefill", "decode", "mixed")
STAGES: Final = ("receive", "schedule", "run", "record", "send")
PROMPT_SOURCES: Final = ("local_compute", "local_cache_hit", "external_kv_transfer")
CACHE_SOURCES: Final = ("device", "host", "disk", "p2p", "external_unspecified")
SLEEP_STATES: Final = ("awake", "weights_offloaded", "discard_all")
SNAPSHOT_RESULTS: Final = ("sent", "dropped")
METHODS: Final = ("GET", "POST", "HEAD", "other")
HANDLERS: Final = ("/v1/completions", "/v1/chat/completions", "/v1/models", "none")  # none: not routed
STATUSES: Final = ("2xx", "3xx", "4xx", "5xx")
WIRE_KINDS: Final = ("from_api_server", "from_engine", "snapshot", "heartbeat", "deployment")
BULKHEADS: Final = (
    "sampling",  # of a whole batch, where each of its sequences alone has its token all the same
    "record",
    "commit",
    "publish",
    "heartbeat",
    "snapshot",
    "scrape",
    "process",
    "audit",
    "console",
    "tracing",
)
VLLM_HOOKS: Final = ("schedule", "preempt", "update", "console", "scrape", "process")  # where our part of vLLM may fail
AUDIT_LAWS: Final = ("iteration_sum", "iteration_count", "tokens", "prompt_tokens", "sequences", "histograms")
GENERATIONS: Final = ("0", "1", "2")  # of Python's garbage collector
CACHE_CONFIG_LABELS: Final = (
    "block_size",
    "num_gpu_blocks",
    "cache_dtype",
    "enable_prefix_caching",
    "kv_cache_size_tokens",
    "kv_cache_max_concurrency",
)
PYTHON_INFO_LABELS: Final = ("implementation", "major", "minor", "patchlevel", "version")

COUNTER, GAUGE, HISTOGRAM, SUMMARY = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM, Kind.SUMMARY
