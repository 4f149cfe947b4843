"""Exemplars in OpenMetrics: of the client's trace or of the answer, and the same from every API server (P5)."""

from __future__ import annotations

import itertools
import json
import os
import signal
import urllib.request
from pathlib import Path

from prometheus_client.openmetrics.parser import text_string_to_metric_families

from tests.e2e.harness import Served, served, wait_for
from tests.e2e.test_p5_same_answer import admin_urls

OPENMETRICS = {"Accept": "application/openmetrics-text; version=1.0.0"}
WORD = "Rumpelstiltskin"
FAMILIES = (
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:e2e_request_latency_seconds",
)

Exemplars = dict[tuple[str, str, str], tuple[str, str, float, float]]


def ask(deployment: Served, traceparent: str | None) -> str:
    """On a connection of its own, so that every API server has its share; gives the answer's id."""
    body = {"prompt": WORD, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    headers = {"Content-Type": "application/json", **({"traceparent": traceparent} if traceparent else {})}
    request = urllib.request.Request(f"{deployment.url}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return str(json.loads(answer.read())["id"])


def exemplars(deployment: Served, path: str = "/metrics") -> Exemplars:
    """(family, engine, le) → (label, id, value, time), as a strict parser reads them; each lies in its bucket."""
    text = deployment.get(path, headers=OPENMETRICS)
    assert WORD not in text
    found: Exemplars = {}
    for family in text_string_to_metric_families(text):
        lower = 0.0
        for sample in family.samples:
            if not sample.name.endswith("_bucket"):
                lower = 0.0
                continue
            upper = float(sample.labels["le"])
            if sample.exemplar is not None:
                value = sample.exemplar.value
                assert lower <= value <= upper
                [(label, identity)] = sample.exemplar.labels.items()
                key = (family.name, sample.labels["engine"], sample.labels["le"])
                found[key] = (label, identity, value, float(sample.exemplar.timestamp))
            lower = upper
    return found


def test_every_api_server_shows_the_same_exemplars_which_are_of_the_clients_traces(tiny_model: Path):
    with served(tiny_model, "--api-server-count", "2") as deployment:
        own: list[Exemplars] = [{}]
        traces = (f"{number:032x}" for number in itertools.count(1))
        sent: set[str] = set()
        while not all(own):  # until each API server has had a request
            assert len(sent) < 400
            sent.update(itertools.islice(traces, 8))
            for trace in sorted(sent)[-8:]:
                ask(deployment, f"00-{trace}-b7ad6b7169203331-00")
            own = [exemplars(deployment, f"{url}/metrics") for url in admin_urls(deployment)]
        deployment.idle_metrics()
        shown = exemplars(deployment)
        assert {family for family, _, _ in shown} == set(FAMILIES)
        assert {label for label, _, _, _ in shown.values()} == {"trace_id"}
        assert {identity for _, identity, _, _ in shown.values()} <= sent
        for _ in range(12):
            assert exemplars(deployment) == shown
        own = [exemplars(deployment, f"{url}/metrics") for url in admin_urls(deployment)]
        assert {*own[0], *own[1]} == {*shown}
        for key, exemplar in shown.items():
            assert exemplar == max((one[key] for one in own if key in one), key=lambda found: found[3])
        answer_id = ask(deployment, "no traceparent")
        newest = max(exemplars(deployment).values(), key=lambda found: found[3])
        assert newest[:2] == ("request_id", answer_id)
        assert " # {" not in deployment.get("/metrics")


def test_exemplars_outlive_the_api_server_that_saw_the_requests(tiny_model: Path):
    with served(tiny_model, "--api-server-count", "1") as deployment:
        ask(deployment, None)
        before = exemplars(deployment)
        assert before
        [pid] = deployment.pids("api-server")
        os.kill(pid, signal.SIGKILL)
        deployment.wait_until_restarted([pid])
        assert wait_for(lambda: exemplars(deployment), "the exemplars") == before


def test_without_statistics_there_are_none(tiny_model: Path):
    with served(tiny_model, "--disable-log-stats") as deployment:
        ask(deployment, f"00-{1:032x}-b7ad6b7169203331-00")
        assert exemplars(deployment) == {}
        assert not list(deployment.runtime_directory.rglob("*.exemplars"))
