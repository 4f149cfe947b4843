"""The generated dashboards: whole, in the catalogue's words, and of nothing that the catalogue does not declare."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from metrics.catalogue import METRICS, ROLES, Kind, Scope
from metrics.dashboards import boards as dashboards
from metrics.dashboards import promql
from metrics.dashboards.boards import DASHBOARDS, Q
from metrics.dashboards.generate import ROOT
from metrics.dashboards.panels import WIDTH
from metrics.dashboards.promql import QueryError, describe, metrics_in

GRAFANA = ROOT / "metrics" / "grafana"
MADE: dict[str, dict[str, Any]] = {name: json.loads(make()) for name, make in DASHBOARDS.items()}
PANELS = [(name, panel) for name, made in MADE.items() for panel in made["panels"] if panel["type"] != "row"]
QUERIES = [(name, panel, target["expr"]) for name, panel in PANELS for target in panel["targets"]]
IDS = [f"{name}: {panel['title']}" for name, panel in PANELS]


def test_a_dashboard_is_made_the_same_every_time():
    assert {name: json.loads(make()) for name, make in DASHBOARDS.items()} == MADE
    assert len({made["uid"] for made in MADE.values()}) == len(MADE) == 4


@pytest.mark.parametrize(("dashboard", "panel"), PANELS, ids=IDS)
def test_a_panel_describes_what_it_reads_in_the_catalogues_words(dashboard: str, panel: dict[str, Any]):
    read = [metric for target in panel["targets"] for metric in metrics_in(target["expr"])]
    assert read, "reads nothing that the catalogue declares"
    assert all(metric.help in panel["description"] for metric in read)


@pytest.mark.parametrize(("dashboard", "panel"), PANELS, ids=IDS)
def test_a_panel_of_numbers_has_a_unit(dashboard: str, panel: dict[str, Any]):
    if panel["type"] == "heatmap":
        assert panel["options"]["yAxis"]["unit"]
    elif panel["type"] == "timeseries" or "thresholds" in panel.get("fieldConfig", {}).get("defaults", {}):
        assert panel["fieldConfig"]["defaults"]["unit"]


@pytest.mark.parametrize(("dashboard", "panel", "expression"), QUERIES)
def test_a_query_is_of_the_chosen_job_model_and_engine(dashboard: str, panel: dict[str, Any], expression: str):
    for name, labels in re.findall(r"([\w:]+)\{(.*?)\}", expression):
        (metric,) = metrics_in(name)
        assert ("job=~" in labels, "model_name=" in labels, "engine=~" in labels) == (
            True,
            metric.has_model,
            metric.has_engine,
        )
        assert 'instance=~"($instance)(/.*)?"' in labels


@pytest.mark.parametrize(("dashboard", "panel", "expression"), QUERIES)
def test_a_query_by_engine_keeps_the_engines_of_two_deployments_apart(
    dashboard: str, panel: dict[str, Any], expression: str
):
    by = [found.split(", ") for found in re.findall(r"by \((.*?)\)", expression)]
    assert all("instance" in labels for labels in by if "engine" in labels or "process" in labels)


@pytest.mark.parametrize("name", sorted(MADE))
def test_a_deployment_is_chosen_by_its_address_whichever_way_it_is_scraped(name: str):
    (variable,) = [one for one in MADE[name]["templating"]["list"] if one["name"] == "instance"]
    pattern = variable["regex"].strip("/")
    for instance in ("[::1]:8000", "[::1]:8000/engine-0"):
        found = re.match(pattern, instance)
        assert found is not None
        assert found[1] == "[::1]:8000"
        assert re.fullmatch(f"({re.escape(found[1])})(/.*)?", instance)
    assert not re.fullmatch(r"(a:8000)(/.*)?", "a:80001/engine-0")


@pytest.mark.parametrize("name", sorted(MADE))
def test_panels_have_numbers_of_their_own_and_fit_the_page(name: str):
    panels = MADE[name]["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert max(x for x, _ in cells) < WIDTH
    assert len(set(cells)) == len(cells), "panels overlap"


@pytest.mark.parametrize("name", sorted(MADE))
def test_a_dashboard_leads_to_the_others_with_what_is_chosen(name: str):
    (link,) = MADE[name]["links"]
    assert link["type"] == "dashboards"
    assert (link["includeVars"], link["keepTime"]) == (True, True)
    assert set(link["tags"]) <= set(MADE[name]["tags"])
    variables = [variable["name"] for variable in MADE[name]["templating"]["list"]]
    assert variables == ["datasource", "job", "instance", "model_name", "engine"]


def test_there_is_a_small_picture_of_every_dashboard():
    pictures = {path.stem: path.stat().st_size for path in GRAFANA.glob("*.png")}
    assert set(pictures) == {name.removesuffix(".json") for name in MADE}
    assert max(pictures.values()) <= 150_000


def test_what_processes_use_is_shown_apart_by_role():
    """A sum over roles is no API server's: its engines' memory would be in it."""
    used = ("process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds")
    shown = [
        (series, role)
        for name, _, expression in QUERIES
        if name == "statistics-plane.json"
        for series, role in re.findall(r'(process_\w+)\{[^}]*process=~"([\w-]+)-\.\*"', expression)
    ]
    assert sorted(shown) == sorted((series, role) for series in used for role in ROLES)
    of_processes = [expression for _, _, expression in QUERIES if "process_" in expression]
    assert len(of_processes) == len(shown), "a panel adds up roles"


def test_the_help_of_what_a_process_uses_says_which_processes_there_are():
    helps = [metric.help for metric in METRICS if metric.name.startswith("process_")]
    assert len(helps) == 6
    assert all(f"{role}-" in text for text in helps for role in ROLES)


def test_grafanas_own_model_reads_a_dashboard_back_whole():
    register_default_plugins()
    for made in MADE.values():
        assert json.loads(JSONEncoder().encode(Dashboard.from_json(made))) == made


def test_every_histogram_of_iterations_and_requests_has_a_heatmap():
    heat = {metric for _, panel in PANELS if panel["type"] == "heatmap" for metric in metrics_of(panel)}
    wanted = {m for m in METRICS if m.kind is Kind.HISTOGRAM and m.scope in (Scope.ENGINE, Scope.REQUEST)}
    assert wanted - heat == {m for m in METRICS if m.name.startswith("http_request_duration_")}


def metrics_of(panel: dict[str, Any]) -> list[Any]:
    return [metric for target in panel["targets"] for metric in metrics_in(target["expr"])]


def test_a_new_iteration_histogram_has_its_heatmap_by_being_declared(monkeypatch: pytest.MonkeyPatch):
    known = next(m for m in METRICS if m.name == "wholebatch:iteration_requests")
    new = dataclasses.replace(known, name="wholebatch:iteration_novelties", help="Novelties of one iteration.")
    monkeypatch.setattr(dashboards, "METRICS", (*METRICS, new))
    monkeypatch.setattr(promql, "_BY_SERIES", {**promql._BY_SERIES, f"{new.name}_bucket": new})
    panels = json.loads(DASHBOARDS["iterations.json"]())["panels"]
    (panel,) = [panel for panel in panels if panel["title"] == "Iteration novelties"]
    assert panel["type"] == "heatmap"
    assert new.help in panel["description"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Q.rate("vllm:no_such_total"),
        lambda: Q.gauge("vllm:iteration_tokens_total"),
        lambda: Q.rate("vllm:request_success_total", no_such="label"),
        lambda: Q.quantile(0.5, "vllm:num_requests_running"),
    ],
)
def test_a_query_of_what_is_not_declared_cannot_be_made(make: Any):
    with pytest.raises(QueryError):
        make()


def test_what_a_query_reads_is_found_whatever_stands_around_it():
    assert [
        m.name for m in metrics_in('sum(rate(vllm:iteration_tokens_total_sum{x="vllm:num_requests_running"}[1m]))')
    ] == ["vllm:iteration_tokens_total"]
    assert metrics_in("model:ttft_slow:ratio_rate5m > 0.1") == []
    assert describe(["up", "wholebatch:exporter_up", "wholebatch:exporter_up > 0"]).count("exporter_up") == 1
