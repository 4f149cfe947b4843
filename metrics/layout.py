"""Catalogue and label values → the cells of a tally: a flat array of float64, the same in every process. Pure.

A tally's layout depends on the process's role and on the deployment's shape only, both fixed for the deployment's
life. Counters and gauges have one cell a series; a histogram has one for each bound and one for +Inf (each counts its
own bucket, not cumulatively) and then its sum. A summary is a histogram without bounds: its count and its sum.

The labels model_name and, in an engine's tally, engine are the same in all series of a tally and therefore not in its
layout; in an API server's tally `engine` is a label like any other.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from metrics.catalogue import (
    API_SERVER,
    ENGINE,
    METRICS,
    SUPERVISOR,
    VLLM_API_SERVER,
    VLLM_ENGINE,
    Bounds,
    Kind,
    Metric,
    Scope,
    bounds_of,
)

DIGEST_BYTES: Final = 16

SCOPES: Final = {
    ENGINE: (Scope.ENGINE, Scope.PROCESS),
    API_SERVER: (Scope.REQUEST, Scope.PROCESS),
    SUPERVISOR: (Scope.PROCESS, Scope.AUDIT),
    VLLM_ENGINE: (Scope.ENGINE, Scope.PROCESS, Scope.HOOK),
    VLLM_API_SERVER: (Scope.PROCESS, Scope.HOOK),
}

Labels = tuple[tuple[str, str], ...]


class LayoutError(KeyError):
    """No such series in this layout."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What the layouts of one deployment depend on."""

    num_engines: int
    num_api_servers: int
    max_model_len: int
    bucket_overrides: tuple[tuple[str, Bounds], ...] = ()  # (family in BUCKETS, bounds)


class Histogram(NamedTuple):
    """Where a histogram's cells are: len(bounds) + 1 buckets from `offset`, then the sum."""

    offset: int
    bounds: Bounds


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One metric with one set of label values, and its cells [offset, offset + num_cells)."""

    metric: Metric
    labels: Labels
    offset: int
    num_cells: int
    bounds: Bounds | None  # of a histogram; () of a summary


class Layout:
    """Which series a tally has, and where. Immutable; made by `build_layout`."""

    __slots__ = ("_by_name", "digest", "gauges", "num_cells", "role", "series")

    def __init__(self, role: str, series: tuple[Series, ...]) -> None:
        self.role = role
        self.series = series
        self.num_cells = sum(s.num_cells for s in series)
        self.digest = _digest(role, series)
        self.gauges: npt.NDArray[np.bool_] = np.zeros(self.num_cells, dtype=bool)  # (num_cells,) which cells are gauges
        for s in series:
            self.gauges[s.offset : s.offset + s.num_cells] = s.metric.kind is Kind.GAUGE
        self.gauges.flags.writeable = False
        self._by_name = {(s.metric.name, frozenset(s.labels)): s for s in series}

    def cell(self, name: str, **labels: str) -> int:
        """The cell of a counter or gauge; raises LayoutError."""
        series = self._find(name, labels)
        if series.bounds is not None:
            raise LayoutError(f"{name} is a histogram")
        return series.offset

    def histogram(self, name: str, **labels: str) -> Histogram:
        """The cells of a histogram or summary; raises LayoutError."""
        series = self._find(name, labels)
        if series.bounds is None:
            raise LayoutError(f"{name} is no histogram")
        return Histogram(series.offset, series.bounds)

    def initial_gauges(self) -> Iterator[tuple[int, float]]:
        """(cell, value) of every gauge, as a new incarnation finds them: 0, or 1 where the catalogue says so."""
        for s in self.series:
            if s.metric.kind is Kind.GAUGE:
                yield s.offset, float(any(value in s.metric.starts_at_one for _, value in s.labels))

    def _find(self, name: str, labels: dict[str, str]) -> Series:
        try:
            return self._by_name[name, frozenset(labels.items())]
        except KeyError:
            raise LayoutError(f"the layout of {self.role} has no series {name} {labels}") from None


def build_layout(role: str, shape: Shape) -> Layout:
    """The layout of every tally of this role in a deployment of this shape."""
    return Layout(role, tuple(_series(role, shape)))


def _series(role: str, shape: Shape) -> Iterator[Series]:
    overrides = dict(shape.bucket_overrides)
    offset = 0
    for metric in METRICS:
        if metric.scope not in SCOPES[role]:
            continue
        bounds = None
        if metric.kind is Kind.HISTOGRAM:
            assert metric.buckets is not None, metric.name
            bounds = bounds_of(metric.buckets, shape.max_model_len, overrides)
        elif metric.kind is Kind.SUMMARY:
            bounds = ()
        num_cells = 1 if bounds is None else len(bounds) + 2
        for labels in _label_sets(metric, shape):
            yield Series(metric=metric, labels=labels, offset=offset, num_cells=num_cells, bounds=bounds)
            offset += num_cells


def _label_sets(metric: Metric, shape: Shape) -> Iterable[Labels]:
    num_of = {"engine": shape.num_engines, "api_server": shape.num_api_servers}
    dimensions: list[list[tuple[str, str]]] = []
    if metric.scope is Scope.REQUEST and metric.has_engine:
        dimensions.append([("engine", str(index)) for index in range(shape.num_engines)])
    for name, values in metric.labels:
        known = values if values is not None else tuple(str(index) for index in range(num_of[name]))
        dimensions.append([(name, value) for value in known])
    return itertools.product(*dimensions)


def _digest(role: str, series: tuple[Series, ...]) -> bytes:
    described: list[Any] = [role, *((s.metric.name, str(s.metric.kind), s.labels, s.offset, s.bounds) for s in series)]
    return hashlib.blake2b(repr(described).encode(), digest_size=DIGEST_BYTES).digest()
