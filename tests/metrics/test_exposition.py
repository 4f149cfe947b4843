"""The text of answers: equal to the client library's byte for byte, and what a parser reads back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    SummaryMetricFamily,
)
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from prometheus_client.samples import Exemplar as LibraryExemplar
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

from metrics.catalogue import API_SERVER, ENGINE, METRICS, SUPERVISOR, Kind, Scope
from metrics.exposition import (
    OPENMETRICS,
    PROCESS_SCOPES,
    TEXT,
    Renderer,
    Stack,
    Template,
    add_up,
    choose_format,
    format_value,
    scrape_part,
)
from metrics.files.exemplars import LABELS, Entries, Exemplar, Origin
from metrics.layout import Shape, build_layout

SHAPE = Shape(num_engines=2, num_api_servers=2, max_model_len=100)
LAYOUTS = {role: build_layout(role, SHAPE) for role in (ENGINE, API_SERVER, SUPERVISOR)}
MODEL = 'org/"model"\\v1'
RENDERER = Renderer()

values = st.one_of(
    st.integers(0, 10), st.integers(0, 2**53), st.floats(0, 1e12, allow_nan=False), st.floats(0, 1e300), st.just(1e6)
)


class Registry:
    """What the client library's encoders want."""

    def __init__(self, families: Iterable[Family]) -> None:
        self._families = list(families)

    def collect(self) -> list[Family]:
        return self._families


def oracle(
    parts: list[tuple[str, tuple[Scope, ...], dict[str, str], np.ndarray, float]],
    *,
    with_created: bool,
    exemplars: Mapping[int, Exemplar] = MappingProxyType({}),
):
    """The families of tallies, made one sample at a time and without any of the code under test.
    A part is (role, scopes, constant labels, cells, created); exemplars are of request scope."""
    families: dict[str, Family] = {}
    kinds = {
        Kind.COUNTER: CounterMetricFamily,
        Kind.GAUGE: GaugeMetricFamily,
        Kind.HISTOGRAM: HistogramMetricFamily,
        Kind.SUMMARY: SummaryMetricFamily,
    }
    for role, scopes, constant, cells, created in parts:
        for series in LAYOUTS[role].series:
            metric = series.metric
            if metric.scope not in scopes:
                continue
            labels = {**dict(series.labels), **constant}
            if metric.scope in PROCESS_SCOPES:
                labels.pop("model_name")
            elif not metric.has_model:
                labels.pop("model_name", None)
            family: Any = families.setdefault(metric.name, kinds[metric.kind](metric.name, metric.help))
            if family.name.endswith(f"_{metric.unit}"):
                family.unit = metric.unit
            before = len(family.samples)
            names = list(labels)
            given_values = list(labels.values())
            shown = cells[series.offset : series.offset + series.num_cells].tolist()
            family._labelnames = tuple(names)
            if not series.bounds:
                family.add_metric(given_values, *shown)  # a value; of a summary, count and sum
            else:
                counts: list[Any] = []
                total = 0.0
                for cell, bound in enumerate((*series.bounds, math.inf), series.offset):
                    total += float(cells[cell])
                    found = exemplars.get(cell) if metric.scope is Scope.REQUEST else None
                    shown_at = found and LibraryExemplar({found.origin.label: found.origin.id}, found.value, found.unix)
                    counts.append((floatToGoString(bound), total, shown_at))
                family.add_metric(given_values, counts, shown[-1])
            if with_created and metric.kind is not Kind.GAUGE:
                family.samples.append(Sample(f"{family.name}_created", labels, created, None, None, None))
            assert len(family.samples) > before
    return Registry(families[m.name] for m in METRICS if m.name in families)


@st.composite
def tallies(draw: st.DrawFn, role: str) -> np.ndarray:
    """Cells of one tally: few values, spread over all cells."""
    pool = draw(st.lists(values, min_size=1, max_size=12))
    offset = draw(st.integers(0, 11))
    return np.array([float(pool[(i * 7 + offset) % len(pool)]) for i in range(LAYOUTS[role].num_cells)])


PARTS = (
    (ENGINE, (Scope.ENGINE,), {"model_name": MODEL, "engine": "0"}),
    (ENGINE, (Scope.ENGINE,), {"model_name": MODEL, "engine": "1"}),
    (API_SERVER, (Scope.REQUEST,), {"model_name": MODEL}),
    (API_SERVER, PROCESS_SCOPES, {"model_name": "", "process": "api-server-0"}),
    (ENGINE, PROCESS_SCOPES, {"model_name": "", "process": "engine-0"}),
    (SUPERVISOR, PROCESS_SCOPES, {"model_name": "", "process": "supervisor"}),
)
TEMPLATES = [
    Template(
        LAYOUTS[role],
        scopes,
        model_name=MODEL,
        engine=int(labels["engine"]) if "engine" in labels else None,
        process=labels.get("process"),
    )
    for role, scopes, labels in PARTS
]


exemplars = st.dictionaries(
    st.sampled_from(Entries(LAYOUTS[API_SERVER]).cells),
    st.builds(
        Exemplar, st.floats(0, 4e9), st.floats(0, 1e9), st.builds(Origin, st.sampled_from(LABELS), st.text(max_size=43))
    ),
    max_size=6,
)


@settings(max_examples=50)
@given(
    st.tuples(*(tallies(role) for role, _, _ in PARTS)),
    st.floats(1e9, 2e9),
    st.sets(st.sampled_from(range(6))),
    exemplars,
)
def test_the_text_is_what_the_client_library_writes(
    cells: tuple[np.ndarray, ...], created: float, which: set[int], exemplars: dict[int, Exemplar]
):
    chosen = sorted(which)
    shown = [exemplars if PARTS[i][1] == (Scope.REQUEST,) else {} for i in chosen]
    parts = [TEMPLATES[i].part(cells[i], created + i, of) for i, of in zip(chosen, shown, strict=True)]
    described = [(*PARTS[i], cells[i], created + i) for i in chosen]
    expected = exposition_of_library(oracle(described, with_created=False))
    assert RENDERER.render(parts, TEXT) == expected
    registry = oracle(described, with_created=True, exemplars=exemplars)
    expected = openmetrics.generate_latest(registry, escaping=openmetrics.ALLOWUTF8)
    assert RENDERER.render(parts, OPENMETRICS) == expected


def exposition_of_library(registry: Registry) -> bytes:
    from prometheus_client.exposition import generate_latest

    return generate_latest(registry)


@settings(max_examples=30)
@given(tallies(ENGINE))
def test_what_is_rendered_is_what_a_parser_reads(cells: np.ndarray):
    body = RENDERER.render([TEMPLATES[0].part(cells, 5.0)]).decode()
    read = {(s.name, frozenset(s.labels.items())): s.value for family in parse_text(body) for s in family.samples}
    for series in LAYOUTS[ENGINE].series:
        metric = series.metric
        if metric.scope is not Scope.ENGINE:
            continue
        labels = {*series.labels, ("model_name", MODEL), ("engine", "0")}
        shown = cells[series.offset : series.offset + series.num_cells]
        if series.bounds is None:
            assert read.pop((metric.name, frozenset(labels))) == shown[0]
            continue
        for bound, count in zip((*series.bounds, math.inf), np.cumsum(shown[:-1]), strict=True):
            assert read.pop((f"{metric.name}_bucket", frozenset({*labels, ("le", floatToGoString(bound))}))) == count
        assert read.pop((f"{metric.name}_count", frozenset(labels))) == np.cumsum(shown[:-1])[-1]
        assert read.pop((f"{metric.name}_sum", frozenset(labels))) == shown[-1]
    assert not read


def test_openmetrics_is_accepted_by_a_strict_parser_and_keeps_colons():
    parts = [t.part(np.ones(LAYOUTS[role].num_cells), 1.5e9) for t, (role, _, _) in zip(TEMPLATES, PARTS, strict=True)]
    parts.append(scrape_part([("wholebatch:exporter_up", {"engine": "0"}, 1.0)], model_name=MODEL))
    body = RENDERER.render(parts, OPENMETRICS).decode()
    names = {family.name for family in parse_openmetrics(body)}
    assert {"vllm:iteration_tokens_total", "vllm:prompt_tokens", "wholebatch:exporter_up"} <= names
    assert not any(name.startswith(("vllm_", "wholebatch_")) for name in names)
    assert 'wholebatch:iterations_created{engine="0"' in body
    assert "\n# UNIT vllm:time_to_first_token_seconds seconds\n" in body
    assert "\n# UNIT vllm:generation_tokens tokens\n" in body
    assert "# UNIT vllm:iteration_tokens_total" not in body


def test_exemplars_are_read_by_a_strict_parser_and_only_in_openmetrics():
    cell = LAYOUTS[API_SERVER].histogram("vllm:time_to_first_token_seconds", engine="1").offset + 2
    trace = Origin("trace_id", "0af7651916cd43dd8448eb211c80319c")
    cells = np.ones(LAYOUTS[API_SERVER].num_cells)
    parts = [TEMPLATES[2].part(cells, 1.5e9, {cell: Exemplar(1.6e9, 0.0075, trace), 10**6: Exemplar(0.0, 0.0, trace)})]
    families = parse_openmetrics(RENDERER.render(parts, OPENMETRICS).decode())
    [sample] = [sample for family in families for sample in family.samples if sample.exemplar]
    assert sample.name == "vllm:time_to_first_token_seconds_bucket"
    assert (sample.labels["engine"], sample.labels["le"]) == ("1", "0.01")
    assert sample.exemplar.labels == {"trace_id": trace.id}
    assert (sample.exemplar.value, float(sample.exemplar.timestamp)) == (0.0075, 1.6e9)
    assert RENDERER.render(parts, TEXT) == RENDERER.render([TEMPLATES[2].part(cells, 1.5e9)], TEXT)


@settings(max_examples=50)
@given(
    st.lists(st.tuples(tallies(API_SERVER), st.floats(1e9, 2e9)), min_size=4, max_size=4),
    st.sets(st.sampled_from(range(4))),
    st.sets(st.sampled_from(range(4))),
)
def test_a_stack_of_tallies_is_written_as_each_by_itself(
    rows: list[tuple[np.ndarray, float]], shown: set[int], ended: set[int]
):
    layout = LAYOUTS[API_SERVER]
    templates = [
        Template(layout, PROCESS_SCOPES, process=str(row), has_gauges=row not in ended) for row in range(len(rows))
    ]
    stack = Stack(layout, [(row, templates[row]) for row in sorted(shown)])
    cells, created = np.stack([cells for cells, _ in rows]), np.array([created for _, created in rows])
    engine = TEMPLATES[0].part(np.ones(LAYOUTS[ENGINE].num_cells), 5.0)  # behind it: its created time has its place
    alone = [templates[row].part(*rows[row]) for row in sorted(shown)]
    for form in (TEXT, OPENMETRICS):
        assert Renderer().render([stack.part(cells, created), engine], form) == Renderer().render(
            [*alone, engine], form
        )


def test_each_family_stands_once_though_several_parts_carry_it():
    parts = [t.part(np.zeros(LAYOUTS[role].num_cells), 0.0) for t, (role, _, _) in zip(TEMPLATES, PARTS, strict=True)]
    lines = RENDERER.render(parts).decode().splitlines()
    types = [line for line in lines if line.startswith("# TYPE")]
    assert len(types) == len(set(types)) == len([line for line in lines if line.startswith("# HELP")])
    names = {metric.name for metric in METRICS if metric.scope not in (Scope.SCRAPE, Scope.HOOK)}
    assert {line.split()[2] for line in types} == names


def test_a_series_that_would_stand_twice_is_refused():
    part = TEMPLATES[0].part(np.zeros(LAYOUTS[ENGINE].num_cells), 0.0)
    with pytest.raises(AssertionError, match="twice"):
        RENDERER.render([part, part])


def test_without_statistics_only_gauges_are_shown():
    template = Template(LAYOUTS[ENGINE], (Scope.ENGINE,), model_name="m", engine=0, log_stats=False)
    body = RENDERER.render([template.part(np.zeros(LAYOUTS[ENGINE].num_cells), 0.0)]).decode()
    assert {line.split()[3] for line in body.splitlines() if line.startswith("# TYPE")} == {"gauge"}
    assert 'vllm:num_requests_running{engine="0",model_name="m"} 0.0\n' in body


def test_of_an_ended_process_no_gauge_is_shown_or_summed():
    layout = LAYOUTS[API_SERVER]
    template = Template(layout, PROCESS_SCOPES, process="api-server-0", has_gauges=False)
    assert b"gauge" not in RENDERER.render([template.part(np.ones(layout.num_cells), 0.0)])
    ones = np.ones(layout.num_cells)
    total = add_up(layout, np.stack([ones, ones, ones]), ended=[1])
    in_flight = layout.cell("wholebatch:api_server_requests_in_flight", engine="1")
    assert total[in_flight] == 2
    assert total[layout.cell("wholebatch:delivered_tokens_total", engine="1")] == 3


def test_an_answer_of_no_parts_is_empty():
    assert RENDERER.render([]) == b""
    assert RENDERER.render([], OPENMETRICS) == b"# EOF\n"


def test_what_a_scrape_makes_itself_is_declared():
    part = scrape_part([("wholebatch:exporter_up", {"engine": "3"}, 0.0)], model_name="m")
    assert RENDERER.render([part]).decode().splitlines()[-1] == 'wholebatch:exporter_up{engine="3",model_name="m"} 0.0'
    with pytest.raises(AssertionError):
        scrape_part([("wholebatch:exporter_up", {"motor": "3"}, 0.0)])
    with pytest.raises(KeyError):
        scrape_part([("vllm:num_requests_running", {"engine": "3"}, 0.0)])


@given(st.one_of(st.floats(), st.integers(-(2**70), 2**70).map(float), values.map(float)))
def test_values_are_written_as_the_client_library_writes_them(value: float):
    assert format_value(value) == floatToGoString(value)


@given(
    st.lists(st.lists(st.one_of(values, st.sampled_from([0.0, -0.0, math.inf, math.nan])), min_size=43, max_size=43))
)
def test_an_answer_does_not_depend_on_the_ones_before(tallies: list[list[float]]):
    renderer, template = Renderer(), TEMPLATES[-1]
    for cells in tallies:
        parts = [template.part(np.array(cells, dtype=np.float64), 1.0)]
        for form in (TEXT, OPENMETRICS):
            assert renderer.render(parts, form) == Renderer().render(parts, form)


def test_memory_for_combinations_of_parts_is_bounded():
    renderer = Renderer()
    layout = LAYOUTS[SUPERVISOR]
    for index in range(100):
        renderer.render([Template(layout, PROCESS_SCOPES, process=str(index)).part(np.zeros(layout.num_cells), 0.0)])
    assert len(renderer._plans) == 16


PROMETHEUS_2 = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("", TEXT.content_type),
        ("*/*", TEXT.content_type),
        ("text/html,application/xhtml+xml", TEXT.content_type),
        ("text/plain;version=0.0.4;q=0.9,application/openmetrics-text;q=0.5", TEXT.content_type),
        ("application/openmetrics-text;version=0.0.1", TEXT.content_type),
        ("application/openmetrics-text;version=2.0.0", TEXT.content_type),
        ("application/openmetrics-text;q=nonsense", TEXT.content_type),
        ("application/openmetrics-text", OPENMETRICS.content_type),
        ("application/openmetrics-text;version=1.0.0;escaping=dots", OPENMETRICS.content_type),
        (PROMETHEUS_2, OPENMETRICS.content_type),
        (PROMETHEUS_3, f"{OPENMETRICS.content_type}; escaping=allow-utf-8"),
    ],
)
def test_openmetrics_is_written_only_for_who_prefers_it(accept: str, content_type: str):
    assert choose_format(accept).content_type == content_type
    assert choose_format(accept).is_openmetrics == content_type.startswith("application/openmetrics")
