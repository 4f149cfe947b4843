"""The engines together as one: few figures without an `engine` label, for whoever reads one sample a name. Pure.

Load-aware routers know one queue and one cache an endpoint; of several series of one name they read the first or the
last. `exposition` is what `GET /metrics/pool` answers, `samples` are those that `--metrics-view pool` puts in the place
of each engine's in the public `/metrics`, `load_report` what a request asks for by the header
`endpoint-load-metrics-format` (ORCA, as vLLM answers it).

Made from the newest snapshot of every engine that was heard within the lease: those are broadcast to every API server,
so each gives the same figures, asks nobody, and is done in microseconds. An engine that is silent is left out, with its
capacity; where all are, there are no figures. Gauges only: a sum over those present would be no counter (P3).

Source of the names that are read: the endpoint picker of gateway-api-inference-extension and of llm-d (running,
waiting, kv_cache_usage_perc, in older releases gpu_cache_usage_perc; block_size and num_gpu_blocks of
cache_config_info), and the KEDA scalers of KServe and of the vLLM production stack (running, waiting).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from engine.wire import Facts
from metrics.catalogue import METRICS
from metrics.exposition import Format, format_value
from metrics.layout import Layout
from metrics.snapshot import Snapshot

RUNNING: Final = "vllm:num_requests_running"
WAITING: Final = "vllm:num_requests_waiting"
CACHE_USAGE: Final = "vllm:kv_cache_usage_perc"
CACHE_CONFIG: Final = "vllm:cache_config_info"
OLD_CACHE_USAGE: Final = "vllm:gpu_cache_usage_perc"

POOLED: Final = frozenset({RUNNING, WAITING, CACHE_USAGE, CACHE_CONFIG})  # of the names that are vLLM's today

_HELP: Final = {metric.name: metric.help for metric in METRICS}
_HELP_OF_OLD: Final = f"{CACHE_USAGE} under its older name."


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolLoad:
    """`kv_usage` is the used share of all blocks: every engine of a deployment has the same number of them, so it is
    the mean over engines."""

    num_engines: int  # those heard
    num_running: float
    num_waiting: float
    kv_usage: float


class Pool:
    """Adds engines up. `layout` is theirs."""

    def __init__(self, layout: Layout, facts: Facts) -> None:
        self._facts = facts
        self._cells = [layout.cell(name) for name in (RUNNING, WAITING, CACHE_USAGE)]

    def figures(self, snapshots: Iterable[Snapshot]) -> PoolLoad | None:
        """One snapshot an engine; None where there is none."""
        tallies = [memoryview(snapshot.cells).cast("d") for snapshot in snapshots]
        if not tallies:
            return None
        running, waiting, usage = (sum(tally[cell] for tally in tallies) for cell in self._cells)
        return PoolLoad(
            num_engines=len(tallies), num_running=running, num_waiting=waiting, kv_usage=usage / len(tallies)
        )

    def exposition(self, figures: PoolLoad | None, form: Format) -> bytes:
        """Prometheus' text, in either format; no series where there are no figures."""
        lines = [] if figures is None else [*self._lines(figures)]
        return "".join([*lines, "# EOF\n" if form.is_openmetrics else ""]).encode()

    def samples(self, figures: PoolLoad | None) -> list[tuple[str, dict[str, str], float]]:
        """(name, labels, value) of those of POOLED; none where there are no figures."""
        if figures is None:
            return []
        return [
            (RUNNING, {}, figures.num_running),
            (WAITING, {}, figures.num_waiting),
            (CACHE_USAGE, {}, figures.kv_usage),
            (CACHE_CONFIG, cache_config(self._facts, figures.num_engines), 1.0),
        ]

    def _lines(self, figures: PoolLoad) -> Iterator[str]:
        labels = ",".join(f'{name}="{value}"' for name, value in cache_config(self._facts, figures.num_engines).items())
        for name, text, labelled, value in (
            (RUNNING, _HELP[RUNNING], "", figures.num_running),
            (WAITING, _HELP[WAITING], "", figures.num_waiting),
            (CACHE_USAGE, _HELP[CACHE_USAGE], "", figures.kv_usage),
            (OLD_CACHE_USAGE, _HELP_OF_OLD, "", figures.kv_usage),
            (CACHE_CONFIG, _HELP[CACHE_CONFIG], f"{{{labels}}}", 1.0),
        ):
            yield f"# HELP {name} Of all engines together. {text}\n# TYPE {name} gauge\n"
            yield f"{name}{labelled} {format_value(value)}\n"


def cache_config(facts: Facts, num_engines: int = 1) -> dict[str, str]:
    """The labels of cache_config_info, for the caches of so many engines."""
    num_blocks = facts.num_gpu_blocks * num_engines
    num_tokens = facts.block_size * num_blocks
    return {
        "block_size": str(facts.block_size),
        "num_gpu_blocks": str(num_blocks),
        "cache_dtype": facts.cache_dtype,
        "enable_prefix_caching": str(facts.enable_prefix_caching),
        "kv_cache_size_tokens": str(num_tokens),
        "kv_cache_max_concurrency": f"{num_tokens / facts.max_model_len:.2f}",
    }


def load_report(asked: str, figures: PoolLoad) -> str | None:
    """The value of the response header `endpoint-load-metrics`; None for a format that there is not."""
    named = {"kv_cache_usage_perc": figures.kv_usage, "num_requests_waiting": figures.num_waiting}
    match asked.strip().lower():
        case "text":
            return "TEXT " + ", ".join(f"named_metrics.{name}={value}" for name, value in named.items())
        case "json":
            return "JSON " + json.dumps({"named_metrics": named})
        case _:
            return None
