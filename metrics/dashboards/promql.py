"""Prometheus queries over the catalogue's metrics, for dashboards and rules. Pure.

A query names only metrics and labels that the catalogue declares: anything else is an error when the query is made, not
an empty panel. Counters and histograms are always summed, because a label that is not asked for (`instance`) may split
them: the same query is right for one scrape of the public port and for one scrape of each process.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from metrics.catalogue import METRICS, Kind, Metric

SUFFIXES: Final = {
    Kind.COUNTER: ("",),
    Kind.GAUGE: ("",),
    Kind.HISTOGRAM: ("_bucket", "_sum", "_count"),
    Kind.SUMMARY: ("_sum", "_count"),
}
TARGET_LABELS: Final = ("job", "instance", "process")  # what a scrape adds

_BY_SERIES: Final = {metric.name + suffix: metric for metric in METRICS for suffix in SUFFIXES[metric.kind]}


class QueryError(ValueError):
    """A query of a series or label that the catalogue does not declare."""


def metrics_in(expression: str) -> list[Metric]:
    """The catalogue's metrics that a query reads, in its order, each once."""
    names = re.findall(r"[a-zA-Z_:][\w:]*", re.sub(r'"[^"]*"', "", expression))
    return list(dict.fromkeys(_BY_SERIES[name] for name in names if name in _BY_SERIES))


def describe(expressions: Sequence[str]) -> str:
    """What the queries read, in the catalogue's words."""
    metrics = dict.fromkeys(metric for expression in expressions for metric in metrics_in(expression))
    return "\n\n".join(f"`{metric.name}`: {metric.help}" for metric in metrics)


def labels_of(metric: Metric) -> tuple[str, ...]:
    """Every label that its series carry in Prometheus."""
    own = [*(["model_name"] if metric.has_model else []), *(["engine"] if metric.has_engine else [])]
    return (*own, *(label.name for label in metric.labels), *TARGET_LABELS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Queries:
    """Writes queries that share a selection (label -> matcher, such as `=~"$engine"`) and a window of time."""

    selection: Mapping[str, str]
    window: str

    def series(self, name: str, /, **labels: str) -> str:
        """The selected series of one name as exposed, `_bucket`, `_sum` or `_count` included.

        A label's value that begins with `=~` is a whole matcher."""
        if name not in _BY_SERIES:
            raise QueryError(f"no series of the catalogue: {name!r}")
        metric = _BY_SERIES[name]
        have = labels_of(metric)
        if unknown := set(labels) - {*have, "le"}:
            raise QueryError(f"{name} has no label {sorted(unknown)}")
        matchers = [f"{label}{matcher}" for label, matcher in self.selection.items() if label in have]
        matchers += [
            f"{label}{value}" if value.startswith("=~") else f'{label}="{value}"' for label, value in labels.items()
        ]
        return f"{name}{{{','.join(matchers)}}}" if matchers else name

    def over(self, function: str, name: str, by: Sequence[str] = (), /, window: str = "", **labels: str) -> str:
        """A counter's `rate` or `increase` over the window, summed."""
        return self.total("sum", f"{function}({self.series(name, **labels)}[{window or self.window}])", by)

    def rate(self, name: str, /, *by: str, window: str = "", **labels: str) -> str:
        return self.over("rate", name, by, window=window, **labels)

    def gauge(self, name: str, /, *by: str, how: str = "sum", **labels: str) -> str:
        return self.total(how, self.series(name, **labels), by)

    def mean(self, name: str, /, *by: str) -> str:
        """The mean of a histogram's observations."""
        return f"{self.rate(f'{name}_sum', *by)} / {self.rate(f'{name}_count', *by)}"

    def quantile(self, quantile: float, name: str, /, *by: str) -> str:
        return f"histogram_quantile({quantile:g}, {self.rate(f'{name}_bucket', 'le', *by)})"

    def heat(self, name: str, /) -> str:
        """A histogram's observations a bucket, for a heatmap."""
        return self.over("increase", f"{name}_bucket", ("le",))

    @staticmethod
    def total(how: str, inner: str, by: Sequence[str]) -> str:
        return f"{how} by ({', '.join(by)}) ({inner})" if by else f"{how}({inner})"
