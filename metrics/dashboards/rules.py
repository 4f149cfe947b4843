"""Prometheus' recording rules and alerts, made from the catalogue: `rule_file()` is the YAML's content. Pure.

The two service levels are about first tokens and about gaps between tokens: which share of them may be slower than a
bound of the histogram. Their alerts fire on how fast the allowed share is being used up, over a long window (it is
real) and a short one (it still goes on). Source: the multi-window burn rates of Google's SRE workbook, chapter 5.

A Prometheus may watch many deployments, as static targets (`instance="HOST:PORT"`) or as discovered ones
(`instance="HOST:PORT/engine-0"`). All series of an engine come from one target either way, and so do those of a
process: their rules keep `instance`. A service level is a model's, over all deployments of a job that serve it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from metrics.catalogue import BUCKETS
from metrics.dashboards.promql import Queries, describe
from metrics.exposition import format_value

Q: Final = Queries(selection={}, window="5m")

MODEL: Final = ("job", "model_name")
ENGINE: Final = ("job", "instance", "model_name", "engine")
TARGET: Final = ("job", "instance")
WINDOWS: Final = ("5m", "30m", "1h", "6h")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceLevel:
    """At most `allowed` of a histogram's observations may be slower than `bound_s`, which is one of its buckets."""

    name: str
    title: str
    histogram: str
    buckets: str
    bound_s: float
    allowed: float

    def slow_share(self, window: str) -> str:
        """The name of the recorded share of slow observations."""
        return f"model:{self.name}_slow:ratio_rate{window}"

    def slow_share_expression(self, window: str) -> str:
        assert self.bound_s in BUCKETS[self.buckets], f"{self.bound_s} is no bound of {self.buckets}"
        every = Q.rate(f"{self.histogram}_count", *MODEL, window=window)
        fast = Q.rate(f"{self.histogram}_bucket", *MODEL, window=window, le=format_value(self.bound_s))
        return f"1 - {fast} / {every}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    name: str
    expression: str
    lasting: str
    severity: str  # page: somebody is hurt now; ticket: look at it today
    summary: str
    reads: str = ""  # queries behind a recorded series, for the description

    def rule(self) -> dict[str, Any]:
        return {
            "alert": self.name,
            "expr": self.expression,
            "for": self.lasting,
            "labels": {"severity": self.severity},
            "annotations": {"summary": self.summary, "description": describe([self.expression, self.reads])},
        }


SERVICE_LEVELS: Final = (
    ServiceLevel(
        name="ttft",
        title="Time to first token",
        histogram="vllm:time_to_first_token_seconds",
        buckets="ttft",
        bound_s=1.0,
        allowed=0.05,
    ),
    ServiceLevel(
        name="itl",
        title="Gaps between tokens",
        histogram="vllm:inter_token_latency_seconds",
        buckets="itl",
        bound_s=0.2,
        allowed=0.01,
    ),
)
# (times the allowed share, long window, short window, severity): 2 % of a month's allowance in an hour, 5 % in six.
BURN_RATES: Final = ((14.4, "1h", "5m", "page"), (6.0, "6h", "30m", "ticket"))

COMPUTED: Final = "wholebatch:iteration_scheduled_tokens_sum"
ENGINE_NAME: Final = "engine {{ $labels.engine }} at {{ $labels.instance }}"
RECOMPUTED_SHARE: Final = "engine:recomputed_tokens:ratio_rate5m"


def recording_rules() -> dict[str, str]:
    """Recorded name -> expression; names are `level:metric:operations`, as Prometheus advises."""
    hits, looked_up = (Q.rate(f"vllm:prefix_cache_{what}_total", *ENGINE) for what in ("hits", "queries"))
    rules = {
        "model:generation_tokens:rate5m": Q.rate("vllm:generation_tokens_total", *MODEL),
        "model:prompt_tokens:rate5m": Q.rate("vllm:prompt_tokens_total", *MODEL),
        "model:requests_ended:rate5m": Q.rate("vllm:request_success_total", *MODEL, "finished_reason"),
        "engine:iterations:rate5m": Q.rate("wholebatch:iterations_total", *ENGINE),
        "engine:iteration_tokens:mean5m": Q.mean("vllm:iteration_tokens_total", *ENGINE),
        "engine:iteration_requests:mean5m": Q.mean("wholebatch:iteration_requests", *ENGINE),
        "engine:prefix_cache_hits:ratio_rate5m": f"{hits} / {looked_up}",
        RECOMPUTED_SHARE: f"{Q.rate('wholebatch:recomputed_tokens_total', *ENGINE)} / {Q.rate(COMPUTED, *ENGINE)}",
    }
    for level in SERVICE_LEVELS:
        rules[f"model:{level.name}_seconds:p95_5m"] = Q.quantile(0.95, level.histogram, *MODEL)
        rules |= {level.slow_share(window): level.slow_share_expression(window) for window in WINDOWS}
    return rules


def alerts() -> list[Alert]:
    return [*(_burn(level, *rate) for level in SERVICE_LEVELS for rate in BURN_RATES), *_plane(), *_engines()]


def _burn(level: ServiceLevel, factor: float, long: str, short: str, severity: str) -> Alert:
    limit = f"{factor * level.allowed:.4g}"
    used = f"{level.title} above {level.bound_s:g} s: {{{{ $value | humanizePercentage }}}} of those of {long}, "
    return Alert(
        name=f"Wholebatch{level.name.upper()}Slow{severity.capitalize()}",
        expression=f"{level.slow_share(long)} > {limit} and {level.slow_share(short)} > {limit}",
        lasting="2m" if severity == "page" else "15m",
        severity=severity,
        summary=f"{used}{factor:g} times what {level.allowed:.0%} allows ({{{{ $labels.model_name }}}})",
        reads=level.slow_share_expression(long),
    )


def _plane() -> list[Alert]:
    """Alerts about the statistics plane itself."""
    return [
        Alert(
            name="WholebatchAuditViolated",
            expression=_grown("wholebatch:audit_violations_total", "law"),
            lasting="0s",
            severity="ticket",
            summary="The counters of {{ $labels.instance }} do not add up: law {{ $labels.law }}",
        ),
        Alert(
            name="WholebatchNoExporter",
            expression=f"{Q.gauge('wholebatch:exporter_up', *ENGINE, how='max')} == 0",
            lasting="30s",
            severity="page",
            summary=f"Nobody exports the series of {ENGINE_NAME} of {{{{ $labels.model_name }}}}",
        ),
        Alert(
            name="WholebatchAbsent",
            expression=_absent(),
            lasting="1m",
            severity="page",
            summary="Prometheus' scrapes have no answer from {{ or $labels.deployment `any deployment` }}",
        ),
        Alert(
            name="WholebatchStatisticsFaults",
            expression=_grown("wholebatch:bulkhead_errors_total", "where"),
            lasting="0s",
            severity="ticket",
            summary="Statistics of {{ $labels.instance }} had a fault, and serving went on: {{ $labels.where }}",
        ),
    ]


def _grown(counter: str, label: str) -> str:
    return f"{Q.over('increase', counter, (*TARGET, label), window='10m')} > 0"


def _absent() -> str:
    """One of several deployments, by the targets of its job that are all down; or every deployment, by having none."""
    # NOTE: not back into `instance`, where the targets of one deployment would be series of the same labels.
    targets = 'label_replace(up, "deployment", "$1", "instance", "([^/]*).*")'
    up, others = Q.total("max", targets, ("job", "deployment")), Q.gauge("wholebatch:exporter_up", "job", how="max")
    return f"{up} == 0 and on (job) {others} or absent({Q.series('wholebatch:exporter_up')})"


def _engines() -> list[Alert]:
    waiting = "vllm:num_requests_waiting"
    growth = Q.total("max", f"deriv({Q.series(waiting)}[10m])", ENGINE)
    usage = Q.total("max", f"avg_over_time({Q.series('vllm:kv_cache_usage_perc')}[5m])", ENGINE)
    restarts = Q.total("max", f"changes({Q.series('wholebatch:engine_incarnation')}[15m])", ENGINE)
    # The supervisor counts: an API server that never serves is never scraped. `increase` extrapolates: not quite 3.
    starts = Q.over("increase", "wholebatch:api_server_starts_total", (*TARGET, "api_server"), window="15m")
    preempting = f"{RECOMPUTED_SHARE} > 0.1 and {Q.rate('vllm:num_preemptions_total', *ENGINE)} > 0"
    return [
        Alert(
            name="WholebatchQueueGrowing",
            expression=f"{growth} > 0 and {Q.gauge(waiting, *ENGINE, how='max')} > 10",
            lasting="10m",
            severity="page",
            summary=f"{ENGINE_NAME} of {{{{ $labels.model_name }}}} takes in more than it finishes",
        ),
        Alert(
            name="WholebatchKVCacheFull",
            expression=f"{usage} > 0.95",
            lasting="5m",
            severity="ticket",
            summary=f"KV cache of {ENGINE_NAME}: {{{{ $value | humanizePercentage }}}} in use for 10 minutes",
        ),
        Alert(
            name="WholebatchPreemptionStorm",
            expression=preempting,
            lasting="5m",
            severity="ticket",
            summary=f"{ENGINE_NAME} spends {{{{ $value | humanizePercentage }}}} of its work on recomputation",
            reads="wholebatch:recomputed_tokens_total",
        ),
        Alert(
            name="WholebatchEngineRestarting",
            expression=f"{restarts} > 0",
            lasting="0s",
            severity="ticket",
            summary=f"{ENGINE_NAME} of {{{{ $labels.model_name }}}}: {{{{ $value }}}} starts in 15 minutes",
        ),
        Alert(
            name="WholebatchAPIServerRestarting",
            expression=f"{starts} > 2.5",
            lasting="0s",
            severity="ticket",
            summary="API server {{ $labels.api_server }} of {{ $labels.instance }} starts again and again",
        ),
    ]


def rule_file() -> dict[str, Any]:
    """The content of Prometheus' rule file."""
    recorded = [{"record": name, "expr": expression} for name, expression in recording_rules().items()]
    return {
        "groups": [
            {"name": "wholebatch-recording", "rules": recorded},
            {"name": "wholebatch-alerts", "rules": [alert.rule() for alert in alerts()]},
        ]
    }
