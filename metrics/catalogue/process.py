"""The metrics of every process, those of the supervisor's audit and of our part of vLLM, and those made while answering
a scrape. Pure."""

from __future__ import annotations

from typing import Final

from metrics.catalogue.metric import (
    AUDIT_LAWS,
    BULKHEADS,
    CACHE_CONFIG_LABELS,
    COUNTER,
    GAUGE,
    GENERATIONS,
    PYTHON_INFO_LABELS,
    VLLM_HOOKS,
    WIRE_KINDS,
    Kind,
    Label,
    Metric,
    Scope,
)


def _process(
    kind: Kind, name: str, unit: str, text: str, labels: tuple[Label, ...] = (), scope: Scope = Scope.PROCESS
) -> Metric:
    return Metric(
        name=name, kind=kind, scope=scope, help=text, unit=unit, labels=labels, has_model=False, has_engine=False
    )


# vLLM's panels of `process_*` sum every process that is scraped; here that is more than API servers.
_WHOSE: Final = (
    " The label process says whose: api-server-N, engine-N or supervisor-0; a sum over it is of all of them."
)

_GENERATION = (Label("generation", GENERATIONS),)
_LAW = (Label("law", AUDIT_LAWS),)

PROCESS_METRICS: Final = (
    _process(
        COUNTER,
        "wholebatch:wire_rejected_total",
        "messages",
        "Messages from other processes that did not parse and were dropped, by what they should have been.",
        (Label("kind", WIRE_KINDS),),
    ),
    _process(
        COUNTER,
        "wholebatch:bulkhead_errors_total",
        "errors",
        "Faults that were caught so that serving went on, by where: of sampling, or of the statistics plane.",
        (Label("where", BULKHEADS),),
    ),
    _process(
        COUNTER,
        "process_cpu_seconds_total",
        "seconds",
        "User and system CPU time of the process, earlier incarnations included." + _WHOSE,
    ),
    _process(GAUGE, "process_resident_memory_bytes", "bytes", "Physical memory the process holds." + _WHOSE),
    _process(GAUGE, "process_virtual_memory_bytes", "bytes", "Address space the process has mapped." + _WHOSE),
    _process(
        GAUGE, "process_start_time_seconds", "seconds", "When the process started, in seconds of Unix time." + _WHOSE
    ),
    _process(GAUGE, "process_open_fds", "descriptors", "File descriptors the process has open." + _WHOSE),
    _process(GAUGE, "process_max_fds", "descriptors", "File descriptors the process may have open." + _WHOSE),
    _process(
        COUNTER,
        "python_gc_objects_collected_total",
        "objects",
        "Objects freed by the garbage collector, by generation, earlier incarnations included.",
        _GENERATION,
    ),
    _process(
        COUNTER,
        "python_gc_objects_uncollectable_total",
        "objects",
        "Objects the garbage collector found unreachable and could not free, by generation.",
        _GENERATION,
    ),
    _process(
        COUNTER,
        "python_gc_collections_total",
        "collections",
        "Runs of the garbage collector, by generation, earlier incarnations included.",
        _GENERATION,
    ),
    _process(
        COUNTER,
        "wholebatch:audit_violations_total",
        "violations",
        "Times the supervisor's audit of the tally files found a law broken, by law.",
        _LAW,
        Scope.AUDIT,
    ),
    _process(
        GAUGE,
        "wholebatch:audit_imbalance_tokens",
        "tokens",
        "By how much the sides of each law differed when the supervisor last audited the tally files.",
        _LAW,
        Scope.AUDIT,
    ),
)

HOOK_METRICS: Final = (
    _process(
        COUNTER,
        "wholebatch:vllm_hook_errors_total",
        "errors",
        "Faults of our part of vLLM that were caught so that vLLM went on, by where.",
        (Label("where", VLLM_HOOKS),),
        Scope.HOOK,
    ),
)

SCRAPE_METRICS: Final = (
    Metric(
        name="wholebatch:exporter_up",
        kind=GAUGE,
        scope=Scope.SCRAPE,
        help="1 while some API server exports the engine's series; 0 says that they are left out of this answer.",
    ),
    Metric(
        name="vllm:cache_config_info",
        kind=GAUGE,
        scope=Scope.SCRAPE,
        help="What the engine's KV cache is, said by the labels; always 1.",
        labels=tuple(Label(name) for name in CACHE_CONFIG_LABELS),
    ),
    Metric(
        name="python_info",
        kind=GAUGE,
        scope=Scope.SCRAPE,
        help="Which Python the answering process runs on, said by the labels; always 1.",
        labels=tuple(Label(name) for name in PYTHON_INFO_LABELS),
        has_model=False,
        has_engine=False,
    ),
)
