"""Pictures of the dashboards: their own queries, asked of a real Prometheus that watched the default model serve.

    python -m tests.benchmarks.dashboard_pictures [--seconds 120] [--out metrics/grafana]

Two engines and four API servers on loopback, waves of requests, and matplotlib instead of Grafana: the same panels in
the same places with the same data, in a plainer dress. One PNG a dashboard.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from engine.default_model import cached_path, fetch
from tests.e2e.harness import Served, served
from tests.e2e.load import Ask, stream
from tests.e2e.prometheus import GRAFANA, Prometheus, fill_in, now, prometheus

MODEL = "SmolLM2-135M-Instruct"
NUM_ENGINES, NUM_CLIENTS = 2, 14
WIDTH_INCHES, ROW_INCHES, DPI = 13.0, 0.24, 80
COLUMNS = 24
MAX_COLOURS = 96
RATE_INTERVAL = "8s"
LEGEND: dict[str, Any] = {
    "fontsize": 5.5,
    "loc": "upper right",
    "framealpha": 0.7,
    "edgecolor": "none",
    "handlelength": 1.2,
}
COLOURS = [plt.get_cmap("tab10")(number) for number in range(10)]

Series = tuple[str, np.ndarray, np.ndarray]  # legend, times (s before the end), values


# --- the load ---


class Waves:
    """Clients that come and go in waves, until the time is over: long and short prompts, some with a common beginning,
    chats, clients that leave early, and a bad request now and then."""

    def __init__(self, deployment: Served, seconds: float) -> None:
        self._deployment = deployment
        self._start = time.monotonic()
        self._seconds = seconds

    def run(self, num_clients: int) -> None:
        clients = [threading.Thread(target=self._client, args=(number,)) for number in range(num_clients)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()

    def _client(self, number: int) -> None:
        source = random.Random(number)
        while (passed := time.monotonic() - self._start) < self._seconds:
            crowd = 0.5 - 0.5 * math.cos(2 * math.pi * passed / 45)
            time.sleep(source.expovariate(0.15 + 0.6 * crowd))
            with suppress(OSError):
                self._ask(source)

    def _ask(self, source: random.Random) -> None:
        kind = source.random()
        if kind < 0.15:
            message = {"role": "user", "content": "Tell me something about rivers."}
            self._deployment.post("/v1/chat/completions", {"messages": [message], "max_tokens": 24})
        elif kind < 0.2:
            self._deployment.post("/v1/completions", {"prompt": "x", "max_tokens": -1})
        else:
            common = tuple(range(1000, 1064)) if kind < 0.5 else ()
            own = tuple(source.randrange(100, 40_000) for _ in range(int(10 ** source.uniform(1, 2.3))))
            ask = Ask((*common, *own), source.randint(8, 48))
            stream(self._deployment, dataclasses.replace(ask, leaves_after_chunks=3) if kind > 0.95 else ask)


# --- the data ---


def ask_series(server: Prometheus, panel: dict[str, Any], engine: str, start: float, end: float) -> list[Series]:
    found = []
    for target in panel["targets"]:
        query = fill_in(target["expr"], model_name=MODEL, interval=RATE_INTERVAL, engine=engine)
        for one in server.query_range(query, start, end, 1.0):
            times, values = np.array([[float(t) - end, float(v)] for t, v in one["values"]]).T
            found.append((legend_of(target["legendFormat"], one["metric"]), times, values))
    return found


def legend_of(form: str, labels: Mapping[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), form)


# --- the drawing ---


def draw_lines(axes: Axes, panel: dict[str, Any], series: Sequence[Series]) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    is_stacked = defaults.get("custom", {}).get("stacking", {}).get("mode") == "normal"
    if is_stacked:
        grid = np.unique(np.concatenate([times for _, times, _ in series]))
        rows = [np.nan_to_num(np.interp(grid, times, values, left=0, right=0)) for _, times, values in series]
        axes.stackplot(grid, rows, labels=[legend for legend, _, _ in series], alpha=0.75, colors=COLOURS)
    else:
        for place, (legend, times, values) in enumerate(series):
            axes.plot(times, values, label=legend, linewidth=1, color=COLOURS[place % len(COLOURS)])
    axes.set_ylim(bottom=0)
    if axes.get_ylim()[1] <= 0.06 and not any(np.nan_to_num(values).any() for _, _, values in series):
        axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(lambda value, _: in_unit(value, defaults.get("unit", "short")))
    name_lines(axes, series)
    axes.grid(alpha=0.25)


def name_lines(axes: Axes, series: Sequence[Series]) -> None:
    """A legend beside the lines: of all of them while they are few, else of those that are not 0 all the time."""
    moving = {legend for legend, _, values in series if np.nan_to_num(values).any()}
    handles, legends = axes.get_legend_handles_labels()
    shown = [place for place, name in enumerate(legends) if len(series) <= 5 or name in moving]
    if shown:
        lines, names = [handles[place] for place in shown], [legends[place] for place in shown]
        axes.legend(lines, names, **LEGEND, bbox_to_anchor=(1.0, 1.0), borderaxespad=0.3)


def draw_heat(axes: Axes, panel: dict[str, Any], series: Sequence[Series]) -> None:
    """Buckets are cumulative: a row of the picture is a bucket less the one below it."""
    rows = sorted(series, key=lambda one: float(one[0]))
    grid = rows[0][1]
    cumulative = np.array([np.interp(grid, times, values) for _, times, values in rows])
    cells = np.diff(cumulative, axis=0, prepend=0)
    cells[cells < 1e-9] = np.nan
    axes.pcolormesh(grid, np.arange(len(rows) + 1) - 0.5, cells[:, 1:], cmap="Oranges", shading="flat")
    unit = panel["options"]["yAxis"]["unit"]
    shown = [place for place in range(len(rows)) if place % max(1, len(rows) // 7) == 0]
    bounds = [float(legend) for legend, _, _ in rows]
    axes.set_yticks(shown, [in_unit(bounds[place], unit) for place in shown])


def draw_number(axes: Axes, panel: dict[str, Any], series: Sequence[Series]) -> None:
    axes.axis("off")
    legend, _, values = series[0]
    is_name = panel.get("options", {}).get("textMode") == "name"
    numbers = values[~np.isnan(values)]
    text = legend if is_name else in_unit(float(numbers[-1]), panel["fieldConfig"]["defaults"]["unit"])
    size = 7 if is_name else 20
    place: dict[str, Any] = {"ha": "center", "va": "center", "transform": axes.transAxes}
    axes.text(0.5, 0.45, text, fontsize=size, color=colour_of(panel, numbers), **place)


def colour_of(panel: dict[str, Any], numbers: np.ndarray) -> str:
    steps = panel.get("fieldConfig", {}).get("defaults", {}).get("thresholds", {}).get("steps", [])
    passed = [step["color"] for step in steps if step.get("value") is None or numbers[-1] >= step["value"]]
    return passed[-1] if passed else "black"


def draw_states(axes: Axes, panel: dict[str, Any], series: Sequence[Series]) -> None:
    for row, (_, times, values) in enumerate(series):
        starts = np.flatnonzero(np.diff(values, prepend=np.nan) != 0)
        for first, last in zip(starts, [*starts[1:], len(values)], strict=True):
            begin, length = times[first], times[last - 1] - times[first] + 1
            axes.broken_barh([(begin, length)], (row - 0.4, 0.8), color=COLOURS[int(values[first]) % 10], alpha=0.6)
            if length > 0.1 * (times[-1] - times[0]):
                axes.text(begin + length / 2, row, f"{values[first]:.10g}", ha="center", va="center", fontsize=7)
    axes.set_yticks(range(len(series)), [legend for legend, _, _ in series])


DRAW: dict[str, Callable[[Axes, dict[str, Any], Sequence[Series]], None]] = {
    "timeseries": draw_lines,
    "heatmap": draw_heat,
    "stat": draw_number,
    "state-timeline": draw_states,
}


def in_unit(value: float, unit: str) -> str:
    """Write a number as Grafana would, or nearly."""
    if math.isinf(value):
        return "∞"
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "bytes":
        return f"{value / 2**20:.0f} MiB"
    if unit == "s":
        return f"{1000 * value:.3g} ms" if 0 < value < 1 else f"{value:.4g} s"
    suffix = "/s" if unit == "reqps" else ""
    return (f"{value / 1000:.3g}k" if value >= 10_000 else f"{value:.4g}") + suffix


def picture(server: Prometheus, name: str, start: float, end: float) -> Figure:
    """Draw one dashboard."""
    dashboard = json.loads((GRAFANA / "dashboards" / f"{name}.json").read_text())
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"]) + 2
    figure = plt.figure(figsize=(WIDTH_INCHES, height * ROW_INCHES), dpi=DPI)
    figure.text(0.01, 1 - 1 / height, dashboard["title"], fontsize=14, va="center", weight="bold")
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        if panel["type"] == "row":
            y = 1 - (place["y"] + 2.5) / height
            figure.text(0.01, y, panel["title"], fontsize=9, va="center", color="dimgray", weight="bold")
            continue
        engines = [str(k) for k in range(NUM_ENGINES)] if "repeat" in panel else [".*"]
        width = COLUMNS / len(engines) if "repeat" in panel else place["w"]
        for number, engine in enumerate(engines):
            box = ((place["x"] + number * width) / COLUMNS, 1 - (place["y"] + 2 + place["h"]) / height)
            area = (box[0] + 0.037, box[1] + 1.1 / height, width / COLUMNS - 0.045, (place["h"] - 2.4) / height)
            axes = figure.add_axes(area)
            axes.set_title(title_of(panel, engine), fontsize=7, loc="left", pad=3)
            axes.tick_params(labelsize=5.5, length=2)
            axes.set_xlim(start - end, 0)
            DRAW[panel["type"]](axes, panel, ask_series(server, panel, engine, start, end))
    return figure


def title_of(panel: dict[str, Any], engine: str) -> str:
    """A panel's title, with the unit where that is too long for an axis."""
    unit = panel.get("fieldConfig", {}).get("defaults", {}).get("unit", "")
    suffix = f" ({unit.removeprefix('suffix: ')})" if unit.startswith("suffix: ") else ""
    return str(panel["title"]).replace("$engine", engine) + suffix


def save(figure: Figure, path: Path) -> None:
    """Write a small PNG: few colours are enough."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    image.quantize(MAX_COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"wrote {path} ({path.stat().st_size / 1000:.0f} kB)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="of load (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=GRAFANA, help="folder of the pictures (default: metrics/grafana)")
    options = parser.parse_args()
    fetch()
    flags = ["--api-server-count", "4", "--data-parallel-size", str(NUM_ENGINES), "--latency-buckets", "fine"]
    # Few KV blocks, so that there are preemptions to be seen.
    flags += ["--served-model-name", MODEL, "--num-gpu-blocks-override", "36", "--max-model-len", "512"]
    with served(cached_path(), *flags) as deployment:
        target = deployment.url.removeprefix("http://")
        with prometheus([{"job_name": "wholebatch", "static_configs": [{"targets": [target]}]}]) as server:
            server.wait_for_scrape(now())
            start = now()
            Waves(deployment, options.seconds).run(NUM_CLIENTS)
            end = now()
            server.wait_for_scrape(end)
            for name in sorted(path.stem for path in (GRAFANA / "dashboards").glob("*.json")):
                save(picture(server, name, start, end), options.out / f"{name}.png")


if __name__ == "__main__":
    main()
