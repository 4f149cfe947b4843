"""Two scrapes of one deployment, and what can be said of the time between them: rates, means, quantiles. Pure.

Nothing is made up. A figure is None where the later scrape lacks its series (an engine without an exporter), where the
earlier one did (it has only just appeared), and where a count fell between the two (its process has started anew
somewhere else): then what happened in between is not known.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from metrics.laws import LabelSet, Samples

START: Final = "process_start_time_seconds"

Bucket = tuple[float, float]  # upper bound, how many at or below it


class Scrape:
    """The samples of one answer, by name; `at` is a monotonic instant."""

    __slots__ = ("_by_name", "at")

    def __init__(self, samples: Samples, at: float) -> None:
        self.at = at
        self._by_name: dict[str, dict[LabelSet, float]] = {}
        for (name, labels), value in samples.items():
            self._by_name.setdefault(name, {})[labels] = value

    def select(self, name: str, labels: Iterable[tuple[str, str]] = ()) -> dict[LabelSet, float]:
        """The series of that name that have these labels among theirs."""
        wanted = set(labels)
        return {have: value for have, value in self._by_name.get(name, {}).items() if wanted <= have}

    def total(self, name: str, labels: Iterable[tuple[str, str]] = ()) -> float | None:
        """The sum of the samples selected; None where there are none."""
        selected = self.select(name, labels)
        return sum(selected.values()) if selected else None

    def values(self, name: str, label: str) -> list[str]:
        """Every value that a label of that name's series has."""
        return sorted({value for labels in self._by_name.get(name, {}) for key, value in labels if key == label})


def is_same_deployment(earlier: Scrape, later: Scrape) -> bool:
    """Whether no supervisor has started between the two: counts of another deployment are no earlier counts."""
    supervisor = (("process", "supervisor-0"),)
    return earlier.total(START, supervisor) == later.total(START, supervisor)


@dataclass(frozen=True, slots=True)
class Window:
    """The time from one scrape to a later one; without an earlier one only the present is known."""

    earlier: Scrape | None
    later: Scrape

    @property
    def seconds(self) -> float:
        """How long it is; 0 without an earlier scrape."""
        return 0.0 if self.earlier is None else self.later.at - self.earlier.at

    def gauge(self, name: str, **labels: str) -> float | None:
        """A gauge's sum in the later scrape."""
        return self.later.total(name, labels.items())

    def increases(self, name: str, **labels: str) -> dict[LabelSet, float] | None:
        """How much each series of a counter grew."""
        if self.earlier is None or not is_same_deployment(self.earlier, self.later):
            return None
        before, now = (scrape.select(name, labels.items()) for scrape in (self.earlier, self.later))
        if not now or any(key not in before or value < before[key] for key, value in now.items()):
            return None
        return {key: value - before[key] for key, value in now.items()}

    def increase(self, name: str, **labels: str) -> float | None:
        """How much a counter grew, its series together."""
        increases = self.increases(name, **labels)
        return None if increases is None else sum(increases.values())

    def rate(self, name: str, **labels: str) -> float | None:
        """A counter's increase a second."""
        return divide(self.increase(name, **labels), self.seconds)

    def mean(self, histogram: str, **labels: str) -> float | None:
        """The mean of what the histogram observed in between."""
        return divide(self.increase(f"{histogram}_sum", **labels), self.increase(f"{histogram}_count", **labels))

    def buckets(self, histogram: str, **labels: str) -> list[Bucket]:
        """What it observed in between, summed over the series; empty where that is not known. Counts that fall from
        one bound to the next are no histogram's: they are raised, as Prometheus does it."""
        by_bound: dict[float, float] = {}
        for key, grown in (self.increases(f"{histogram}_bucket", **labels) or {}).items():
            bound = float(dict(key)["le"])
            by_bound[bound] = by_bound.get(bound, 0.0) + grown
        bounds = sorted(by_bound)
        return list(zip(bounds, accumulate((by_bound[bound] for bound in bounds), max), strict=True))


def divide(part: float | None, whole: float | None) -> float | None:
    """None where either is not known, or nothing was there to divide by."""
    return None if part is None or not whole else part / whole


def quantile(q: float, buckets: Sequence[Bucket]) -> float | None:
    """As Prometheus' histogram_quantile estimates it: observations lie evenly in their bucket, the lowest of which
    begins at 0, and what lies above the greatest bound counts as that bound. None if nothing was observed."""
    if not buckets or not buckets[-1][1]:
        return None
    rank = q * buckets[-1][1]
    low = below = 0.0
    for bound, at_or_below in buckets:
        if at_or_below >= rank and at_or_below > below:
            if math.isinf(bound):
                return low
            return min(bound, low + (bound - low) * max(rank - below, 0.0) / (at_or_below - below))
        if not math.isinf(bound):
            low, below = bound, at_or_below
    return low


def per_bucket(buckets: Sequence[Bucket]) -> list[Bucket]:
    """(upper bound, how many in this bucket alone)."""
    lower = [0.0, *(count for _, count in buckets)]
    return [(bound, count - before) for (bound, count), before in zip(buckets, lower, strict=False)]
