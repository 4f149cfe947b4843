"""Every metric, declared once; layouts, exposition, dashboards and documentation follow from it. Pure.

Street: truth. Names, labels and bucket bounds of `vllm:*` are vLLM's, so that what people already run works unchanged;
`wholebatch:*` is ours. Every label value is known when a deployment starts: no series is ever made by what a request
says.

To add a metric, add one declaration to `catalogue.engine`, `catalogue.request` or `catalogue.process`, and one line
where it is counted; a whole-iteration histogram is counted in `engine/schedule/record.py` and is then right at any
number of API servers.
"""

from __future__ import annotations

from typing import Final

from metrics.catalogue.buckets import BUCKETS, FINE_LATENCY, Bounds, bounds_of, parse_overrides
from metrics.catalogue.engine import ENGINE_METRICS
from metrics.catalogue.metric import (
    API_SERVER,
    AUDIT_LAWS,
    BULKHEADS,
    ENDED_REASONS,
    ENGINE,
    FINISHED_REASONS,
    GENERATIONS,
    HANDLERS,
    LOST_REASONS,
    METHODS,
    PHASES,
    PYTHON_INFO_LABELS,
    ROLES,
    STAGES,
    STATUSES,
    SUPERVISOR,
    UNDELIVERED_REASONS,
    VLLM_API_SERVER,
    VLLM_ENGINE,
    Kind,
    Metric,
    Scope,
)
from metrics.catalogue.process import HOOK_METRICS, PROCESS_METRICS, SCRAPE_METRICS
from metrics.catalogue.request import REQUEST_METRICS

__all__ = [
    "API_SERVER",
    "AUDIT_LAWS",
    "BUCKETS",
    "BULKHEADS",
    "ENDED_REASONS",
    "ENGINE",
    "FINE_LATENCY",
    "FINISHED_REASONS",
    "GENERATIONS",
    "HANDLERS",
    "LOST_REASONS",
    "METHODS",
    "METRICS",
    "PHASES",
    "PYTHON_INFO_LABELS",
    "ROLES",
    "STAGES",
    "STATUSES",
    "SUPERVISOR",
    "UNDELIVERED_REASONS",
    "VLLM_API_SERVER",
    "VLLM_ENGINE",
    "Bounds",
    "Kind",
    "Metric",
    "Scope",
    "bounds_of",
    "parse_overrides",
]

METRICS: Final[tuple[Metric, ...]] = (
    *ENGINE_METRICS,
    *REQUEST_METRICS,
    *PROCESS_METRICS,
    *HOOK_METRICS,
    *SCRAPE_METRICS,
)
