"""Tallies → the text of one answer to a scrape, from lines prepared beforehand. Pure.

One answer is put together from parts. A part is the series of some tally (or made while answering) with their values:

    engine = Template(engine_layout, (Scope.ENGINE,), model_name=name, engine=0)  # one an engine
    requests = Template(api_server_layout, (Scope.REQUEST,), model_name=name)  # `engine` is in the layout
    process = Template(layout, PROCESS_SCOPES, process="api-server-2")  # on an admin port: process=None
    cells, created_unix = add_up(api_server_layout, [(reading.cells, reading.created_unix, is_alive), …])

    parts = [
        engine.part(np.frombuffer(snapshot.cells), snapshot.created_unix),
        requests.part(cells, created_unix),
        process.part(reading.cells, reading.created_unix),
        scrape_part([("wholebatch:exporter_up", {"engine": "0"}, 1.0)], model_name=name),
    ]
    form = choose_format(request.headers.get("Accept", ""))
    body = renderer.render(parts, form)  # renderer = Renderer()

Templates and the renderer are made once and kept; `part` and `render` are what a scrape costs. Every family appears
once, with HELP and TYPE and all its series together, however many parts carry it, in the catalogue's order. With
statistics disabled (`log_stats=False`) a template has gauges only; with `has_gauges=False` (a process that has ended)
everything else.

The text is, byte for byte, what prometheus_client writes for the same families, `_created` and exemplars in OpenMetrics
only (tested, in both formats). Own code because it is 20 times as fast (measured: 0.6 ms for 3000 lines), and because
the client library's OpenMetrics writes `vllm_x` for `vllm:x` unless told otherwise. Our names are written as they are
under every escaping scheme that leaves colons alone.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from metrics.catalogue import METRICS
from metrics.exemplars import Exemplar
from metrics.layout import Labels, Layout, Series
from metrics.metric import Kind, Metric, Scope

PROCESS_SCOPES: Final = (Scope.PROCESS, Scope.AUDIT)
MAX_PLANS: Final = 16  # P9: an answer's parts change with what is alive, and come back

Cells = npt.NDArray[np.float64]
Exemplars = Mapping[int, Exemplar]
NO_EXEMPLARS: Final[Exemplars] = MappingProxyType({})


# --- formats ---


class Format(NamedTuple):
    """How an answer is written, and its Content-Type."""

    is_openmetrics: bool
    content_type: str


TEXT: Final = Format(False, "text/plain; version=0.0.4; charset=utf-8")
OPENMETRICS: Final = Format(True, "application/openmetrics-text; version=1.0.0; charset=utf-8")
_ESCAPINGS: Final = ("allow-utf-8", "underscores", "values")  # schemes under which our names are written as they are


def choose_format(accept: str) -> Format:
    """OpenMetrics 1.0 where an Accept header prefers it to plain text; text 0.0.4 in every other case."""
    best, best_quality = TEXT, 0.0
    for item in accept.split(","):
        media, *rest = (token.strip() for token in item.split(";"))
        parameters = dict(token.split("=", 1) for token in rest if "=" in token)
        form = _format_of(media, parameters)
        quality = _quality(parameters.get("q", "1"))
        if form is not None and quality > best_quality:
            best, best_quality = form, quality
    return best


def _format_of(media: str, parameters: Mapping[str, str]) -> Format | None:
    if media.lower() in ("text/plain", "text/*", "*/*"):
        return TEXT
    if media.lower() != "application/openmetrics-text" or parameters.get("version", "1.0.0").split(".")[0] != "1":
        return None
    escaping = parameters.get("escaping")
    if escaping not in _ESCAPINGS:
        return OPENMETRICS
    return Format(True, f"{OPENMETRICS.content_type}; escaping={escaping}")


def _quality(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


# --- values and labels ---


def format_value(value: float) -> str:
    """A float as Go writes it, which is what `le` and every value of the text formats look like."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
    digits = repr(value)
    point = digits.find(".")
    if value <= 0 or point <= 6:
        return digits
    mantissa = f"{digits[0]}.{digits[1:point]}{digits[point + 1 :]}".rstrip("0.")
    return f"{mantissa}e+{point - 1:02d}"


_format_large = lru_cache(maxsize=8192)(format_value)  # values from 10⁶, which repr does not write as Go does


def _format_all(values: Cells) -> list[str]:
    strings = list(map(repr, values.tolist()))
    for index in np.flatnonzero(~(np.abs(values) < 1e6)).tolist():
        strings[index] = _format_large(float(values[index]))
    return strings


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _exemplar(exemplar: Exemplar) -> str:
    label, identity = exemplar.origin
    return f' # {{{label}="{_escape(identity)}"}} {format_value(exemplar.value)} {exemplar.unix}'


# --- parts ---


class Line(NamedTuple):
    """One sample's name and labels. `ends_series` marks the last line of a counter's or histogram's series."""

    suffix: str
    labels: Labels
    ends_series: bool

    def text(self, name: str) -> str:
        """All that stands before the value."""
        pairs = ",".join(f'{label}="{_escape(value)}"' for label, value in sorted(self.labels))
        return f"{name}{self.suffix}{{{pairs}}} " if pairs else f"{name}{self.suffix} "


@dataclass(frozen=True, slots=True, eq=False)
class Lines:
    """The samples of a part, families in any order; equal only to itself, since it is a key."""

    families: tuple[tuple[Metric, tuple[Line, ...]], ...]


class Part(NamedTuple):
    """Series and their values: one value a line, in the lines' order. Exemplars are by line."""

    lines: Lines
    values: Cells
    created_unix: float
    exemplars: Exemplars = NO_EXEMPLARS


class Template:
    """The prepared series of one kind of tally, some scopes of it, with the labels that are constant in it."""

    __slots__ = ("_buckets", "_counts", "_cumulated", "_lines", "_sources", "_totals")

    def __init__(
        self,
        layout: Layout,
        scopes: Sequence[Scope],
        *,
        model_name: str = "",
        engine: int | None = None,
        process: str | None = None,
        log_stats: bool = True,
        has_gauges: bool = True,
    ) -> None:
        sources: list[int] = []  # of each line: the cell it shows, before buckets are cumulated
        buckets: dict[int, list[range]] = {}  # number of buckets → their lines, of each histogram
        families: dict[str, tuple[Metric, list[Line]]] = {}
        for series in layout.series:
            metric = series.metric
            if metric.scope not in scopes or not (has_gauges if metric.kind is Kind.GAUGE else log_stats):
                continue
            constant = _constant_labels(metric, model_name, engine, process)
            if series.bounds is not None:
                first, num_buckets = len(sources), len(series.bounds) + 1
                buckets.setdefault(num_buckets, []).append(range(first, first + num_buckets))
            sources.extend(_sources(series))
            families.setdefault(metric.name, (metric, []))[1].extend(_lines(series, constant))
        self._lines = Lines(tuple((metric, tuple(lines)) for metric, lines in families.values()))
        self._sources = np.array(sources, dtype=np.intp)
        self._cumulated = [np.array(ranges, dtype=np.intp) for ranges in buckets.values()]
        self._totals = np.array([r[-1] for ranges in buckets.values() for r in ranges], dtype=np.intp)  # +Inf lines
        self._counts = self._totals + 1
        self._buckets = {sources[line]: line for ranges in buckets.values() for lines in ranges for line in lines}

    def part(self, cells: Cells, created_unix: float, exemplars: Exemplars = NO_EXEMPLARS) -> Part:
        """These series with a tally's values, which count since `created_unix`, and exemplars by bucket's cell."""
        values = cells[self._sources]
        for lines in self._cumulated:  # (number of histograms, number of buckets)
            values[lines] = np.cumsum(values[lines], axis=1)
        values[self._counts] = values[self._totals]
        by_line = {self._buckets[cell]: one for cell, one in exemplars.items() if cell in self._buckets}
        return Part(self._lines, values, created_unix, by_line)


def _constant_labels(metric: Metric, model_name: str, engine: int | None, process: str | None) -> Labels:
    labels: list[tuple[str, str]] = []
    if metric.has_model:
        labels.append(("model_name", model_name))
    if metric.scope is Scope.ENGINE:
        assert engine is not None, metric.name
        labels.append(("engine", str(engine)))
    if metric.scope in PROCESS_SCOPES and process is not None:
        labels.append(("process", process))
    return tuple(labels)


def _sources(series: Series) -> Iterator[int]:
    if series.bounds is None:
        yield series.offset
        return
    infinity = series.offset + len(series.bounds)
    yield from range(series.offset, infinity + 1)
    yield infinity  # becomes the count
    yield infinity + 1  # the sum


def _lines(series: Series, constant: Labels) -> Iterator[Line]:
    labels = constant + series.labels
    if series.bounds is None:
        yield Line("", labels, series.metric.kind is Kind.COUNTER)
        return
    for bound in (*series.bounds, math.inf):
        yield Line("_bucket", (*labels, ("le", format_value(bound))), False)
    yield Line("_count", labels, False)
    yield Line("_sum", labels, True)


_SCRAPE: Final = {metric.name: metric for metric in METRICS if metric.scope is Scope.SCRAPE}


def scrape_part(samples: Iterable[tuple[str, Mapping[str, str], float]], *, model_name: str = "") -> Part:
    """A part of metrics of scope SCRAPE, made while answering: (name, labels, value). model_name is added where the
    metric has it."""
    samples = tuple(samples)
    described = tuple((name, tuple(sorted(labels.items()))) for name, labels, _ in samples)
    values = np.array([value for _, _, value in samples], dtype=np.float64)
    return Part(_scrape_lines(described, model_name), values, 0.0)


@lru_cache(maxsize=MAX_PLANS)
def _scrape_lines(described: tuple[tuple[str, Labels], ...], model_name: str) -> Lines:
    families = []
    for name, labels in described:
        metric = _SCRAPE[name]
        declared = {label.name for label in metric.labels} | ({"engine"} if metric.has_engine else set())
        assert {label for label, _ in labels} == declared, (name, labels)
        labels += (("model_name", model_name),) if metric.has_model else ()
        families.append((metric, (Line("", labels, False),)))
    return Lines(tuple(families))


def add_up(layout: Layout, tallies: Iterable[tuple[Cells, float, bool]]) -> tuple[Cells, float]:
    """The sum of tallies of one layout, (cells, created_unix, is_alive) each, and since when it counts: gauges of ended
    processes are left out, their counters stay."""
    total = np.zeros(layout.num_cells)
    created_unix = 0.0
    for cells, created, is_alive in tallies:
        total += cells if is_alive else np.where(layout.gauges, 0.0, cells)
        created_unix = max(created_unix, created)  # one tally begun anew is a reset of the sum
    return total, created_unix


# --- answers ---


class Renderer:
    """Writes answers; remembers, for the latest combinations of parts, which line comes where."""

    __slots__ = ("_plans",)

    def __init__(self) -> None:
        self._plans: OrderedDict[tuple[bool, tuple[Lines, ...]], _Plan] = OrderedDict()

    def render(self, parts: Sequence[Part], form: Format = TEXT) -> bytes:
        """The answer's body. No two parts may have the same series (P2)."""
        key = (form.is_openmetrics, tuple(part.lines for part in parts))
        plan = self._plans.pop(key, None) or _Plan(*key)
        self._plans[key] = plan
        if len(self._plans) > MAX_PLANS:
            self._plans.popitem(last=False)
        return plan.render(parts)


class _Plan:
    """The text of some combination of parts, in pieces: every value stands between two texts. What was written last
    is kept, so that an answer costs what has changed since: under load some hundred values of thousands."""

    __slots__ = ("_last", "_order", "_pieces", "_places")

    def __init__(self, is_openmetrics: bool, parts: tuple[Lines, ...]) -> None:
        num_values = sum(len(lines) for part in parts for _, lines in part.families)
        by_name: dict[str, list[tuple[Line, int, int]]] = {}  # (line, its value's index, its part's)
        index = 0
        for number, part in enumerate(parts):
            for metric, lines in part.families:
                for line in lines:
                    by_name.setdefault(metric.name, []).append((line, index, num_values + number))
                    index += 1
        texts: list[str] = []
        order: list[int] = []  # of each value in the text: its index in all parts' values and created times
        head = ""
        for metric in METRICS:
            if metric.name not in by_name:
                continue
            head += _header(metric, is_openmetrics)
            for text, value in _samples(metric, by_name[metric.name], is_openmetrics):
                texts.append(head + text)
                order.append(value)
                head = "\n"
        assert len(set(texts)) == len(texts), "a series stands twice in one answer"
        texts.append(head + ("# EOF\n" if is_openmetrics else ""))
        self._order = np.array(order, dtype=np.intp)
        self._places = {value: place for place, value in enumerate(order)} if is_openmetrics else {}
        self._last = np.zeros(len(order))
        self._pieces = ["0.0"] * (2 * len(texts) - 1)
        self._pieces[::2] = texts

    def render(self, parts: Sequence[Part]) -> bytes:
        values = np.concatenate([*(part.values for part in parts), [part.created_unix for part in parts]])[self._order]
        changed = np.flatnonzero(values.view(np.int64) != self._last.view(np.int64))  # bits: -0.0 is not 0.0
        for place, text in zip(changed.tolist(), _format_all(values[changed]), strict=True):
            self._pieces[2 * place + 1] = text
        self._last = values
        pieces = self._with_exemplars(parts) if self._places else self._pieces
        return "".join(pieces).encode()

    def _with_exemplars(self, parts: Sequence[Part]) -> list[str]:
        pieces = self._pieces.copy()
        first = 0
        for part in parts:
            for line, exemplar in part.exemplars.items():
                pieces[2 * self._places[first + line] + 1] += _exemplar(exemplar)
            first += len(part.values)
        return pieces


def _header(metric: Metric, is_openmetrics: bool) -> str:
    name = _family_name(metric) if is_openmetrics else metric.name
    text = metric.help.replace("\\", r"\\").replace("\n", r"\n")
    if is_openmetrics:
        text = text.replace('"', r"\"")
    header = f"# HELP {name} {text}\n# TYPE {name} {metric.kind}\n"
    has_unit = is_openmetrics and metric.unit and name.endswith(f"_{metric.unit}")  # the format wants it in the name
    return f"{header}# UNIT {name} {metric.unit}\n" if has_unit else header


def _family_name(metric: Metric) -> str:
    return metric.name.removesuffix("_total") if metric.kind is Kind.COUNTER else metric.name


def _samples(metric: Metric, lines: list[tuple[Line, int, int]], is_openmetrics: bool) -> Iterator[tuple[str, int]]:
    for line, value, created in lines:
        yield line.text(metric.name), value
        if is_openmetrics and line.ends_series:
            yield line._replace(suffix="_created").text(_family_name(metric)), created
