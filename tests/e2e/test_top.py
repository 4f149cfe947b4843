"""The terminal view of a real deployment: everything it shows is known, and is what the clients saw."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from metrics.top import terminal as top
from tests.e2e.harness import served, total, wait_for
from tests.e2e.load import asks, steady_load


def unknown(thing: Any) -> list[str]:
    """Fields that are None."""
    return [field.name for field in dataclasses.fields(thing) if getattr(thing, field.name) is None]


def test_every_figure_of_a_busy_deployment_is_known(tiny_model, capsys):
    flags = ("--api-server-count", "2", "--max-model-len", "512", "--served-model-name", "a-model")
    with served(tiny_model, *flags) as deployment:
        work = asks(8, prompt_tokens=(4, 40), max_tokens=24, vocab=200)
        with steady_load(deployment, work, 4):
            wait_for(lambda: total(deployment.metrics(), "wholebatch:exporter_up") == 1, "an exporter")
            first = top.look(deployment.url)
            time.sleep(1.5)  # process figures are counted once a second
            figures = top.figures(first, top.look(deployment.url))
            assert top.main(["--url", deployment.url, "--once"]) == 0
    assert figures.model == "a-model"
    assert unknown(figures) == []
    (engine,) = figures.engines
    assert unknown(engine) + unknown(engine.process) == []
    assert [unknown(server) + unknown(server.process) for server in figures.servers] == [[], []]
    assert all(latency.count and None not in latency.quantiles for latency in figures.latencies)
    assert sum(server.delivered_per_s or 0 for server in figures.servers) > 0
    assert sum(count for _, count in figures.iteration_buckets) > 0
    assert engine.exporter.split()[1] == "term"
    assert set(figures.laws) >= {"iteration_sum", "tokens"}
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 100
