"""The kinds of panel that the dashboards consist of, in the vocabulary of Grafana's foundation SDK. Pure.

A panel's description is the help of the metrics that its queries read, so that it cannot say anything else. Identifiers
are assigned when a dashboard is put together, in order: the same declarations make the same JSON.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, TypeVar

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, statetimeline, timeseries
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_model
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models.common import BigValueColorMode, BigValueGraphMode, BigValueTextMode
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from metrics.dashboards.promql import describe

Panel = Builder[model.Panel]
P = TypeVar("P", timeseries.Panel, heatmap.Panel, stat.Panel, statetimeline.Panel)

DATASOURCE: Final = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
TAG: Final = "wholebatch"
WIDTH: Final = 24  # of a dashboard, in Grafana's columns
HEIGHT: Final = 8

PER_SECOND: Final = "reqps"
TOKENS_PER_SECOND: Final = "suffix: tokens/s"
SECONDS, RATIO, COUNT, BYTES = "s", "percentunit", "short", "bytes"

_GOOD, _BAD = "green", "red"


class Query(NamedTuple):
    expression: str
    legend: str = ""


class Row(NamedTuple):
    title: str
    panels: Sequence[Panel]


def lines(title: str, *queries: Query, unit: str = COUNT, span: int = 8, stacked: bool = False) -> timeseries.Panel:
    """Values over time; `stacked` where they are parts of a whole."""
    panel = timeseries.Panel().title(title).unit(unit).span(span).height(HEIGHT).min(0)
    panel.line_width(1).show_points(common_model.VisibilityMode.NEVER)
    if stacked:
        panel.fill_opacity(40).stacking(common.StackingConfig().mode(common_model.StackingMode.NORMAL))
    panel.tooltip(common.VizTooltipOptions().mode(common_model.TooltipDisplayMode.MULTI))
    return _with_queries(panel, queries)


def heat(title: str, expression: str, *, unit: str = COUNT, span: int = 8, repeat: str = "") -> heatmap.Panel:
    """A histogram over time, one column an interval; `repeat` names the variable that it is repeated for."""
    panel = heatmap.Panel().title(title).span(span).height(HEIGHT).calculate(False)
    panel.color(heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Oranges").steps(64))
    panel.y_axis(heatmap.YAxisConfig().unit(unit)).filter_values(heatmap.FilterValueRange().le(1e-9))
    if repeat:
        panel.repeat(repeat).repeat_direction("h").max_per_row(4)
    return _with_queries(panel, [Query(expression, "{{le}}")], PromQueryFormat.HEATMAP)


def number(
    title: str, query: Query, *, unit: str = COUNT, bad_above: float | None = None, bad_below: float | None = None
) -> stat.Panel:
    """One number, red beyond its limit."""
    panel = stat.Panel().title(title).unit(unit).span(4).height(4)
    steps = [model.Threshold(color=_GOOD)]
    if bad_above is not None:
        steps = [model.Threshold(color=_GOOD), model.Threshold(value=bad_above, color=_BAD)]
    if bad_below is not None:
        steps = [model.Threshold(color=_BAD), model.Threshold(value=bad_below, color=_GOOD)]
    panel.thresholds(dashboard.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(steps))
    return _with_queries(panel, [query])


def fact(title: str, query: Query, *, span: int = 8) -> stat.Panel:
    """What a metric's labels say, in words."""
    panel = stat.Panel().title(title).span(span).height(HEIGHT).text_mode(BigValueTextMode.NAME)
    panel.color_mode(BigValueColorMode.NONE).graph_mode(BigValueGraphMode.NONE)
    return _with_queries(panel, [query])


def states(title: str, *queries: Query, span: int = 8) -> statetimeline.Panel:
    """A value that keeps for long, as coloured stretches of time."""
    panel = statetimeline.Panel().title(title).span(span).height(HEIGHT)
    return _with_queries(panel, queries)


def _with_queries(panel: P, queries: Sequence[Query], form: PromQueryFormat = PromQueryFormat.TIME_SERIES) -> P:
    panel.datasource(DATASOURCE).description(describe([query.expression for query in queries]))
    for place, query in enumerate(queries):
        target = prometheus.Dataquery().expr(query.expression).legend_format(query.legend).range()
        panel.with_target(target.format(form).ref_id(chr(ord("A") + place)))
    return panel


def variable(name: str, label: str, query: str, *, multi: bool = False, part: str = "") -> dashboard.QueryVariable:
    """A choice among a label's values, or among what the group of the regular expression `part` matches of each."""
    made = dashboard.QueryVariable(name).label(label).datasource(DATASOURCE).query(query)
    made.refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(model.VariableSort.NUMERICAL_ASC)
    if part:
        made.regex(part)
    if multi:
        made.multi(True).include_all(True).all_value(".*")
        made.current(model.VariableOption(selected=True, text="All", value="$__all"))
    return made


def put_together(
    uid: str, title: str, description: str, variables: Sequence[dashboard.QueryVariable], rows: Sequence[Row]
) -> str:
    """One dashboard as Grafana's JSON."""
    made = dashboard.Dashboard(title).uid(uid).description(description).tags([TAG]).readonly()
    made.tooltip(model.DashboardCursorSync.CROSSHAIR).time("now-30m", "now").refresh("10s")
    links = dashboard.DashboardLink("wholebatch").type(model.DashboardLinkType.DASHBOARDS).tags([TAG])
    made.link(links.include_vars(True).keep_time(True))
    made.with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    for one in variables:
        made.with_variable(one)
    for row in rows:
        made.with_row(dashboard.Row(row.title))
        for panel in row.panels:
            made.with_panel(panel)
    raw: dict[str, Any] = json.loads(JSONEncoder(sort_keys=True).encode(made.build()))
    for identifier, one_panel in enumerate(raw["panels"], start=1):
        one_panel["id"] = identifier
    return json.dumps(raw, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
