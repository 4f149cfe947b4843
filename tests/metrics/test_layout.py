"""Catalogue and shape → cells."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metrics.catalogue import API_SERVER, ENGINE, METRICS, ROLES, SUPERVISOR, VLLM_API_SERVER, VLLM_ENGINE, Kind, Scope
from metrics.layout import LayoutError, Shape, build_layout

SHAPE = Shape(num_engines=2, num_api_servers=4, max_model_len=8192)

shapes = st.builds(
    Shape, num_engines=st.integers(1, 4), num_api_servers=st.integers(1, 4), max_model_len=st.integers(1, 10**6)
)


@settings(max_examples=30)
@given(shapes, st.sampled_from(ROLES))
def test_cells_belong_to_exactly_one_series(shape: Shape, role: str):
    layout = build_layout(role, shape)
    owned = [cell for s in layout.series for cell in range(s.offset, s.offset + s.num_cells)]
    assert owned == list(range(layout.num_cells))
    assert len({(s.metric.name, frozenset(s.labels)) for s in layout.series}) == len(layout.series)


@settings(max_examples=30)
@given(shapes, st.sampled_from(ROLES))
def test_the_same_shape_gives_the_same_layout_everywhere(shape: Shape, role: str):
    one, other = build_layout(role, shape), build_layout(role, shape)
    assert one.digest == other.digest
    assert len(one.digest) == 16
    assert one.series == other.series


def test_whatever_changes_cells_or_their_meaning_changes_the_digest():
    shapes = [
        SHAPE,
        Shape(num_engines=3, num_api_servers=4, max_model_len=8192),
        Shape(num_engines=2, num_api_servers=5, max_model_len=8192),
        Shape(num_engines=2, num_api_servers=4, max_model_len=100),
        Shape(num_engines=2, num_api_servers=4, max_model_len=8192, bucket_overrides=(("itl", (1.0,)),)),
    ]
    both = {build_layout(role, shape).digest for shape in shapes for role in (ENGINE, API_SERVER)}
    # An engine's layout depends on the number of API servers, an API server's on the engines and the context length.
    assert len(both) == 2 + 4
    same_size = [
        Shape(num_engines=1, num_api_servers=1, max_model_len=10, bucket_overrides=(("n", (b,)),)) for b in (1, 2)
    ]
    assert len({build_layout(ENGINE, shape).digest for shape in same_size}) == 2


def test_every_metric_but_the_scrape_ones_is_in_the_layout_of_its_roles():
    every = {*ROLES, VLLM_ENGINE, VLLM_API_SERVER}
    roles = {
        Scope.ENGINE: {ENGINE, VLLM_ENGINE},
        Scope.REQUEST: {API_SERVER},
        Scope.PROCESS: every,
        Scope.AUDIT: {SUPERVISOR},
        Scope.HOOK: {VLLM_ENGINE, VLLM_API_SERVER},
        Scope.SCRAPE: set(),
    }
    layouts = {role: {s.metric.name for s in build_layout(role, SHAPE).series} for role in every}
    for metric in METRICS:
        assert {role for role, names in layouts.items() if metric.name in names} == roles[metric.scope], metric.name


def test_request_scope_has_a_series_for_each_engine_and_engine_scope_has_none():
    requests = build_layout(API_SERVER, SHAPE)
    cells = {requests.cell("wholebatch:received_tokens_total", engine=engine) for engine in ("0", "1")}
    assert len(cells) == 2
    assert requests.cell("vllm:admission_rejections_total", reason="max_num_queued_reqs") >= 0
    assert build_layout(ENGINE, SHAPE).cell("vllm:generation_tokens_total") >= 0


def test_lost_tokens_are_kept_by_reason_and_api_server():
    layout = build_layout(ENGINE, SHAPE)
    cells = {
        layout.cell("wholebatch:lost_tokens_total", reason=reason, api_server=str(index))
        for reason in ("server_lost", "engine_lost")
        for index in range(4)
    }
    assert len(cells) == 8


def test_a_histogram_has_a_cell_for_each_bound_one_for_infinity_and_its_sum():
    layout = build_layout(ENGINE, SHAPE)
    histogram = layout.histogram("wholebatch:iteration_duration_seconds", phase="mixed")
    series = next(s for s in layout.series if s.offset == histogram.offset)
    assert series.num_cells == len(histogram.bounds) + 2 == 18


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("vllm:no_such_metric", {}),
        ("vllm:generation_tokens_total", {"engine": "0"}),
        ("wholebatch:iterations_total", {}),
        ("wholebatch:iterations_total", {"phase": "encode"}),
        ("vllm:iteration_tokens_total", {}),
        ("vllm:request_success_total", {"finished_reason": "stop"}),
    ],
)
def test_an_unknown_cell_is_an_error_that_names_it(name: str, labels: dict[str, str]):
    with pytest.raises(LayoutError, match=name):
        build_layout(ENGINE, SHAPE).cell(name, **labels)


def test_a_counter_is_no_histogram():
    with pytest.raises(LayoutError, match="no histogram"):
        build_layout(ENGINE, SHAPE).histogram("vllm:generation_tokens_total")


def test_gauges_are_marked():
    layout = build_layout(ENGINE, SHAPE)
    for series in layout.series:
        cells = layout.gauges[series.offset : series.offset + series.num_cells]
        assert set(cells.tolist()) == {series.metric.kind is Kind.GAUGE}
