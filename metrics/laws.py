"""The laws that a deployment's figures keep, as data, and their check on any set of samples. Pure.

Laws are checked on samples {(name, labels): value}, named as in an exposition: a scraped text gives them
(`metrics.audit`), and so do tallies (`samples_of_tally`).

A law is exact when the deployment is idle. While it runs, what one process has counted another has not yet, so a law
is an inequality, and its smaller side is taken from the earlier of two sets of samples. A law that needs series which
are absent (nobody exports the engine at the moment) is not applicable; that is no violation.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Final

from metrics.layout import Layout

LabelSet = frozenset[tuple[str, str]]
Samples = Mapping[tuple[str, LabelSet], float]

# Tokens are whole numbers and exact; seconds are sums that depend on the order of adding.
TOLERANCE: Final = 1e-6


class Status(StrEnum):
    HOLDS = "holds"
    VIOLATED = "violated"
    NOT_APPLICABLE = "not applicable"


@dataclass(frozen=True, slots=True)
class Total:
    """One side's term: the sum of a metric's samples, or of those with the given values of a label."""

    name: str
    label: str = ""
    values: tuple[str, ...] = ()

    def __str__(self) -> str:
        short = self.name.partition(":")[2]
        return f"{short}{{{'|'.join(self.values)}}}" if self.values else short


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """Σ smaller = Σ greater for each engine when idle (≤ if not `is_exact`), Σ smaller ≤ Σ greater while running."""

    name: str  # in metric.AUDIT_LAWS; several laws may share one
    sentence: str
    smaller: tuple[Total, ...]
    greater: tuple[Total, ...]
    gauges: tuple[Total, ...] = ()  # on the smaller side, when idle only: they may lag behind the counters
    is_exact: bool = True
    is_mutual: bool = False  # both sides come from one commit: while running, ≤ holds either way
    is_checked_running: bool = True
    only_first_incarnation: bool = False  # holds while no engine died


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What the check of one law for one engine found. `imbalance`: by how much it is violated, else 0."""

    law: str
    sentence: str
    engine: str
    status: Status
    imbalance: float = 0.0
    detail: str = ""


ITERATION_SUM: Final = Total("vllm:iteration_tokens_total_sum")
ITERATION_COUNT: Final = Total("vllm:iteration_tokens_total_count")
GENERATED: Final = Total("vllm:generation_tokens_total")
BY_SOURCE: Final = Total("vllm:prompt_tokens_by_source_total")
CACHE_HIT: Final = Total("vllm:prompt_tokens_by_source_total", "source", ("local_cache_hit",))
CACHED: Final = Total("vllm:prompt_tokens_by_source_total", "source", ("local_cache_hit", "external_kv_transfer"))
RECEIVED: Final = Total("wholebatch:received_tokens_total")
ACCEPTED: Final = Total("wholebatch:sequences_accepted_total")
SUBMITTED: Final = Total("wholebatch:sequences_submitted_total")
ENDED: Final = Total("wholebatch:sequences_ended_total")
# Ends by which a sequence may have been submitted and yet never have come to the engine.
ENDED_BY_FAULT: Final = Total("wholebatch:sequences_ended_total", "finished_reason", ("server_lost", "error"))
RUNNING: Final = Total("vllm:num_requests_running")
WAITING: Final = Total("vllm:num_requests_waiting")
IN_FLIGHT: Final = Total("wholebatch:api_server_requests_in_flight")
INCARNATION: Final = Total("wholebatch:engine_incarnation")

PROCESS_COUNTER: Final = "process_cpu_seconds_total"
PROCESS_GAUGE: Final = "process_start_time_seconds"

HISTOGRAMS_LAW: Final = "histograms"
HISTOGRAMS_SENTENCE: Final = "buckets do not fall, +Inf is the count, the sum fits the buckets"

LAWS: Final = (
    Law(
        name="iteration_sum",
        sentence="iteration tokens are prompt tokens computed + recomputed + generated tokens",
        smaller=(
            Total("wholebatch:prompt_tokens_computed_total"),
            Total("wholebatch:recomputed_tokens_total"),
            GENERATED,
        ),
        greater=(ITERATION_SUM,),
        is_mutual=True,
    ),
    Law(
        name="iteration_count",
        sentence="each iteration is observed once in iteration tokens",
        smaller=(Total("wholebatch:iterations_total"),),
        greater=(ITERATION_COUNT,),
        is_mutual=True,
    ),
    Law(
        name="iteration_count",
        sentence="each iteration is observed once in scheduled tokens",
        smaller=(Total("wholebatch:iteration_scheduled_tokens_count"),),
        greater=(ITERATION_COUNT,),
        is_mutual=True,
    ),
    Law(
        name="tokens",
        sentence="generated tokens are received by an API server or lost",
        smaller=(RECEIVED, Total("wholebatch:lost_tokens_total")),
        greater=(GENERATED,),
    ),
    Law(
        name="tokens",
        sentence="received tokens are delivered or undelivered for a stated reason",
        smaller=(Total("wholebatch:delivered_tokens_total"), Total("wholebatch:undelivered_tokens_total")),
        greater=(RECEIVED,),
    ),
    Law(
        name="prompt_tokens",
        sentence="prompt tokens have a source",
        smaller=(BY_SOURCE,),
        greater=(Total("vllm:prompt_tokens_total"),),
        is_mutual=True,
    ),
    Law(
        name="prompt_tokens",
        sentence="cached prompt tokens are those of the sources that are caches",
        smaller=(CACHED,),
        greater=(Total("vllm:prompt_tokens_cached_total"),),
        is_mutual=True,
    ),
    Law(
        name="prompt_tokens",
        sentence="cached prompt tokens were found in the prefix cache",  # and more: of requests aborted in prefill
        smaller=(CACHE_HIT,),
        greater=(Total("vllm:prefix_cache_hits_total"),),
        is_exact=False,
    ),
    Law(
        name="prompt_tokens",
        sentence="tokens found in a prefix cache were found in one of its tiers",
        smaller=(Total("vllm:prompt_tokens_cached_by_source_total"),),
        greater=(Total("vllm:prefix_cache_hits_total"), Total("vllm:external_prefix_cache_hits_total")),
        is_mutual=True,
    ),
    Law(
        name="sequences",
        sentence="accepted sequences have finished, run or wait",
        smaller=(Total("wholebatch:sequences_finished_total"),),
        greater=(ACCEPTED,),
        gauges=(RUNNING, WAITING),
    ),
    Law(
        name="sequences",
        sentence="submitted sequences have ended",  # or are in flight, which a gauge counts in requests
        smaller=(ENDED,),
        greater=(SUBMITTED,),
    ),
    Law(
        name="sequences",
        sentence="accepted sequences were submitted",
        smaller=(ACCEPTED,),
        greater=(SUBMITTED,),
        is_exact=False,
    ),
    Law(
        name="sequences",
        sentence="submitted sequences were accepted, or ended by a fault, while no engine died",
        smaller=(SUBMITTED,),
        greater=(ACCEPTED, ENDED_BY_FAULT),
        is_exact=False,
        is_checked_running=False,
        only_first_incarnation=True,
    ),
)

_GAUGES: Final = (RUNNING, WAITING, IN_FLIGHT)
# The counters that laws are about.
COUNTERS: Final = frozenset(total.name for law in LAWS for total in (*law.smaller, *law.greater))


# --- checks ---


def check(samples: Samples, *, idle: bool) -> list[Finding]:
    """The laws on one set of samples. If the deployment is not idle, only what holds at any instant (histograms)."""
    book = _Book(samples)
    laws = [_check_idle(law, book, engine) for law in LAWS for engine in book.engines] if idle else []
    return [*laws, *_check_histograms(samples)]


def check_running(earlier: Samples, later: Samples) -> list[Finding]:
    """The laws as inequalities between two sets of samples of a deployment at work."""
    before, after = _Book(earlier), _Book(later)
    engines = [engine for engine in after.engines if engine in before.engines]
    laws = [_check_running(law, before, after, e) for law in LAWS if law.is_checked_running for e in engines]
    return [*laws, *_check_histograms(later), *_check_falls(earlier, later)]


def is_idle(earlier: Samples, later: Samples) -> bool:
    """Whether nothing is under way: nothing runs, waits or is in flight, nothing has been counted in between, and no
    process is dead: what it left open is settled by its successor."""
    names = {total.name for total in _GAUGES}
    is_quiet = all(value == 0 for samples in (earlier, later) for (name, _), value in samples.items() if name in names)
    return is_quiet and _counted(earlier) == _counted(later) and _are_all_alive(earlier) and _are_all_alive(later)


def _are_all_alive(samples: Samples) -> bool:
    """An exposition has the counters of every process, but the gauges of living ones only."""
    known, alive = (
        {labels for name, labels in samples if name == wanted} for wanted in (PROCESS_COUNTER, PROCESS_GAUGE)
    )
    return known == alive


def _counted(samples: Samples) -> dict[tuple[str, LabelSet], float]:
    return {key: value for key, value in samples.items() if key[0] in COUNTERS}


class _Book:
    """One set of samples, by metric and engine."""

    def __init__(self, samples: Samples) -> None:
        self._samples: dict[tuple[str, str], list[tuple[LabelSet, float]]] = defaultdict(list)
        for (name, labels), value in samples.items():
            self._samples[name, dict(labels).get("engine", "")].append((labels, value))
        self.engines = sorted({engine for name, engine in self._samples if name in COUNTERS})

    def has(self, totals: Sequence[Total], engine: str) -> bool:
        return all((total.name, engine) in self._samples for total in totals)

    def sum(self, totals: Sequence[Total], engine: str) -> float:
        return math.fsum(value for total in totals for value in self._values(total, engine))

    def _values(self, total: Total, engine: str) -> Iterator[float]:
        for labels, value in self._samples.get((total.name, engine), ()):
            if not total.values or dict(labels).get(total.label) in total.values:
                yield value


def _check_idle(law: Law, book: _Book, engine: str) -> Finding:
    smaller = (*law.smaller, *law.gauges)
    if not book.has((*smaller, *law.greater), engine) or (
        law.only_first_incarnation and book.sum([INCARNATION], engine) != 1
    ):
        return _not_applicable(law, engine)
    excess = book.sum(smaller, engine) - book.sum(law.greater, engine)
    relation = "=" if law.is_exact else "≤"
    return _finding(law, engine, abs(excess) if law.is_exact else excess, _detail(law, smaller, relation, book, engine))


def _check_running(law: Law, before: _Book, after: _Book, engine: str) -> Finding:
    totals = (*law.smaller, *law.greater)
    if not before.has(totals, engine) or not after.has(totals, engine):
        return _not_applicable(law, engine)
    excess = before.sum(law.smaller, engine) - after.sum(law.greater, engine)
    if law.is_mutual:
        excess = max(excess, before.sum(law.greater, engine) - after.sum(law.smaller, engine))
    return _finding(law, engine, excess, _detail(law, law.smaller, "≤" if not law.is_mutual else "≈", after, engine))


def _detail(law: Law, smaller: Sequence[Total], relation: str, book: _Book, engine: str) -> str:
    """Write the law with its figures: `accepted 7 = finished 5 + running 2`."""

    def side(totals: Sequence[Total]) -> str:
        return " + ".join(f"{total} {book.sum([total], engine):g}" for total in totals)

    return f"{side(smaller)} {relation} {side(law.greater)}"


def _finding(law: Law, engine: str, excess: float, detail: str) -> Finding:
    is_violated = not excess <= TOLERANCE  # NaN is a violation
    return Finding(
        law=law.name,
        sentence=law.sentence,
        engine=engine,
        status=Status.VIOLATED if is_violated else Status.HOLDS,
        imbalance=excess if is_violated else 0.0,
        detail=detail,
    )


def _not_applicable(law: Law, engine: str) -> Finding:
    return Finding(law=law.name, sentence=law.sentence, engine=engine, status=Status.NOT_APPLICABLE)


# --- histograms ---


@dataclass(slots=True)
class _Histogram:
    buckets: list[tuple[float, float]]  # (le, cumulative count)
    count: float = math.nan
    sum: float = math.nan


def _histograms(samples: Samples) -> dict[tuple[str, LabelSet], _Histogram]:
    found: dict[tuple[str, LabelSet], _Histogram] = {}
    for (name, labels), value in samples.items():
        if name.endswith("_bucket"):
            le = dict(labels).get("le", "nan")
            key = (name.removesuffix("_bucket"), frozenset(pair for pair in labels if pair[0] != "le"))
            found.setdefault(key, _Histogram([])).buckets.append((float(le), value))
    for (name, labels), histogram in found.items():
        histogram.buckets.sort()
        histogram.count = samples.get((f"{name}_count", labels), math.nan)
        histogram.sum = samples.get((f"{name}_sum", labels), math.nan)
    return found


def _misshape(h: _Histogram) -> tuple[str, float] | None:
    """Say what is wrong with one histogram of observations from 0, and by how much."""
    counts = [count for _, count in h.buckets]
    falls = max((before - after for before, after in pairwise([0.0, *counts])), default=0.0)
    if not falls <= 0:
        return "a bucket is smaller than the one below it", falls
    if h.buckets[-1][0] != math.inf or counts[-1] != h.count:
        return f"+Inf bucket {counts[-1]:g}, count {h.count:g}", abs(counts[-1] - h.count)
    lowest = highest = below = 0.0
    bound = 0.0
    for le, count in h.buckets:
        in_bucket = count - below
        if in_bucket:
            lowest += in_bucket * bound
            highest += in_bucket * le
        bound, below = le, count
    slack = TOLERANCE * (1 + abs(h.sum))
    if lowest - slack <= h.sum <= highest + slack:
        return None
    return f"sum {h.sum:g} is not within {lowest:g} to {highest:g}", max(lowest - h.sum, h.sum - highest)


def _check_histograms(samples: Samples) -> list[Finding]:
    """A finding for each histogram with a wrong shape; if there is none, one that says so."""
    histograms = _histograms(samples)
    broken = [
        _histogram_finding(key, *wrong) for key, histogram in histograms.items() if (wrong := _misshape(histogram))
    ]
    status = Status.HOLDS if histograms else Status.NOT_APPLICABLE
    detail = f"{len(histograms)} histograms"
    fine = Finding(law=HISTOGRAMS_LAW, sentence=HISTOGRAMS_SENTENCE, engine="", status=status, detail=detail)
    return broken or [fine]


def _check_falls(earlier: Samples, later: Samples) -> Iterator[Finding]:
    """P3: a finding for each histogram of which a cell fell from one scrape to the next."""
    after = _histograms(later)
    for key, before in _histograms(earlier).items():
        if key not in after:
            continue
        now = after[key]
        pairs = zip((before.count, before.sum), (now.count, now.sum), strict=True)
        fell = [old - new for old, new in pairs if new < old - TOLERANCE * (1 + abs(old))]
        fell += [
            dict(before.buckets)[le] - count for le, count in now.buckets if dict(before.buckets).get(le, 0) > count
        ]
        if fell:
            yield _histogram_finding(key, "a cell fell from one scrape to the next", max(fell))


def _histogram_finding(key: tuple[str, LabelSet], wrong: str, imbalance: float) -> Finding:
    name, labels = key
    rest = ",".join(f"{label}={value}" for label, value in sorted(labels) if label not in ("engine", "model_name"))
    return Finding(
        law=HISTOGRAMS_LAW,
        sentence=HISTOGRAMS_SENTENCE,
        engine=dict(labels).get("engine", ""),
        status=Status.VIOLATED,
        imbalance=imbalance,
        detail=f"{name}{{{rest}}}: {wrong}" if rest else f"{name}: {wrong}",
    )


# --- samples ---


def samples_of_tally(layout: Layout, cells: Sequence[float], **labels: str) -> dict[tuple[str, LabelSet], float]:
    """A tally's cells under the names and labels of an exposition; `labels` are those that the layout leaves out."""
    samples: dict[tuple[str, LabelSet], float] = {}
    for series in layout.series:
        name, pairs = series.metric.name, frozenset((*series.labels, *labels.items()))
        if series.bounds is None:
            samples[name, pairs] = float(cells[series.offset])
            continue
        total = 0.0
        for index, bound in enumerate((*series.bounds, math.inf)):
            total += float(cells[series.offset + index])
            if series.bounds:
                samples[f"{name}_bucket", pairs | {("le", "+Inf" if bound == math.inf else repr(float(bound)))}] = total
        samples[f"{name}_count", pairs] = total
        samples[f"{name}_sum", pairs] = float(cells[series.offset + series.num_cells - 1])
    return samples
