"""A real Prometheus for a test: Debian's package, on loopback, with its own configuration and data directory; and the
queries that dashboards and rules consist of, as they stand in the generated files."""

from __future__ import annotations

import json
import math
import re
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tests.e2e.harness import ROOT, wait_for

GRAFANA = ROOT / "metrics" / "grafana"
RULES = GRAFANA / "rules" / "wholebatch.yml"

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="no `prometheus` and `promtool`: install Debian's package prometheus",
)


class Target(NamedTuple):
    """One query of a panel, its variables not yet replaced."""

    dashboard: str
    panel: dict[str, Any]
    expression: str
    legend: str

    def __str__(self) -> str:
        return f"{self.dashboard}: {self.panel['title']}: {self.expression}"


def dashboard_targets() -> list[Target]:
    """Every query of every dashboard."""
    panels = [
        (path.stem, panel)
        for path in sorted((GRAFANA / "dashboards").glob("*.json"))
        for panel in json.loads(path.read_text())["panels"]
    ]
    return [
        Target(dashboard, panel, target["expr"], target["legendFormat"])
        for dashboard, panel in panels
        for target in panel.get("targets", [])
    ]


def fill_in(
    expression: str, *, model_name: str, interval: str, engine: str = ".*", job: str = ".*", instance: str = ".*"
) -> str:
    """The query with Grafana's variables replaced; one that is left over is an error."""
    values = {"model_name": model_name, "engine": engine, "job": job, "instance": instance, "__rate_interval": interval}
    filled = re.sub(r"\$(\w+)", lambda match: values[match.group(1)], expression)
    assert "$" not in filled, filled
    return filled


class Prometheus:
    """A running one."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **parameters: str) -> Any:
        """The `data` of an answer of its HTTP interface."""
        try:
            with urllib.request.urlopen(
                f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=30
            ) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from error

    def query(self, expression: str, at: float | None = None) -> dict[frozenset[tuple[str, str]], float]:
        """Labels -> value of everything the query gives that is a number."""
        answer = self.get("query", query=expression, **({} if at is None else {"time": str(at)}))
        assert answer["resultType"] == "vector", answer
        values = {frozenset(one["metric"].items()): float(one["value"][1]) for one in answer["result"]}
        return {labels: value for labels, value in values.items() if not math.isnan(value)}

    def query_range(self, expression: str, start: float, end: float, step_s: float) -> list[dict[str, Any]]:
        parameters = {"start": str(start), "end": str(end), "step": str(step_s)}
        result: list[dict[str, Any]] = self.get("query_range", query=expression, **parameters)["result"]
        return result

    def wait_for_scrape(self, after: float) -> None:
        """Until every target has been scraped since `after` (Unix time)."""

        def is_scraped() -> bool:
            targets = self.get("targets")["activeTargets"]
            oldest = self.query("min(timestamp(up))").get(frozenset(), 0.0)
            return bool(targets) and oldest > after and all(target["health"] == "up" for target in targets)

        wait_for(is_scraped, "a scrape of every target", 30.0)


@contextmanager
def prometheus(scrape_configs: Sequence[Mapping[str, Any]], *, rules: Path | None = RULES) -> Iterator[Prometheus]:
    """A Prometheus that scrapes and evaluates every second; ended, and its data removed, on leaving."""
    directory = Path(tempfile.mkdtemp(prefix="wb-prometheus-"))
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [] if rules is None else [str(rules)],
        "scrape_configs": list(scrape_configs),
    }
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = ["prometheus", f"--config.file={directory}/prometheus.yml", f"--web.listen-address={address}"]
    command += [f"--storage.tsdb.path={directory}/data", "--log.level=warn"]
    with (directory / "log").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    server = Prometheus(f"http://{address}")
    try:
        wait_for(lambda: _is_ready(server.url, process, directory / "log"), "Prometheus", 20.0)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(20)
        finally:
            process.kill()
            shutil.rmtree(directory, ignore_errors=True)


def _is_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> bool:
    assert process.poll() is None, log.read_text()
    try:
        with urllib.request.urlopen(f"{url}/-/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def now() -> float:
    return time.time()
