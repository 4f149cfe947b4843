"""Limits hold over all API servers, also where many requests come in one moment; what can never be served is a 400."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.e2e.harness import Served, served, total, wait_for

LIMIT, NUM_CLIENTS = 3, 24


@pytest.fixture(scope="module")
def deployment(tiny_model: Path) -> Iterator[Served]:
    flags = ("--api-server-count", "4", "--max-model-len", "512", "--max-num-queued-reqs", str(LIMIT))
    with served(tiny_model, *flags) as running:
        yield running


class Client(threading.Thread):
    """Asks again until it is served, or told to stop; then it stops reading."""

    def __init__(self, url: str, start: threading.Barrier, stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self.statuses: list[int] = []
        self._address = urlsplit(url).netloc
        self._begin = start
        self._end = stop

    def run(self) -> None:
        body = json.dumps({"prompt": "a", "max_tokens": 500, "ignore_eos": True, "stream": True})
        self._begin.wait()
        while not self._end.is_set():
            connection = http.client.HTTPConnection(self._address, timeout=60)
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            self.statuses.append(connection.getresponse().status)
            if self.statuses[-1] == 200:
                self._end.wait(60)
            connection.close()


def test_a_burst_over_four_api_servers_passes_no_limit(deployment: Served):
    start, stop = threading.Barrier(NUM_CLIENTS), threading.Event()
    clients = [Client(deployment.url, start, stop) for _ in range(NUM_CLIENTS)]
    for client in clients:
        client.start()
    most = 0.0
    try:
        wait_for(lambda: sum(client.statuses[-1:] == [200] for client in clients) >= LIMIT, "the first three served")
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            samples = deployment.metrics()
            most = max(most, total(samples, "vllm:num_requests_running") + total(samples, "vllm:num_requests_waiting"))
    finally:
        stop.set()
        for client in clients:
            client.join()
    assert most == LIMIT


def test_what_could_never_be_served_is_no_503(deployment: Served):
    status, answer = deployment.post("/v1/completions", {"prompt": ["a", "b"], "n": 2, "max_tokens": 1})
    assert (status, answer["error"]["code"]) == (400, "max_num_queued_reqs")
