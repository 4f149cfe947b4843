"""The default model, end to end, as `make serve` starts it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import Served, served, total, wait_for

LEASE_S = 0.6


@pytest.fixture(scope="module")
def deployment(default_model: Path) -> Iterator[Served]:
    with served(default_model, "--api-server-count", "4") as running:
        yield running


def test_it_answers_in_sensible_english(deployment: Served):
    ask = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}
    status, answer = deployment.post("/v1/chat/completions", ask | {"max_tokens": 32})
    assert status == 200
    assert "Paris" in answer["choices"][0]["message"]["content"]
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_a_long_prefill_leaves_no_gap_in_the_series(deployment: Served):
    before = deployment.idle_metrics()
    prompt = [1000 + i for i in range(2040)]
    answer: list[dict[str, object]] = []
    client = threading.Thread(target=lambda: answer.append(deployment.complete(prompt, 1)))
    client.start()
    began = time.monotonic()
    later: list[bool] = []  # whether a scrape had the series, of those that a loop without a beacon would have left out
    while client.is_alive():
        is_late = time.monotonic() > began + 2 * LEASE_S
        samples = deployment.metrics()
        is_up = total(samples, "wholebatch:exporter_up") == 1
        assert not is_up or total(samples, "wholebatch:iterations_total") >= total(
            before, "wholebatch:iterations_total"
        )
        later += [is_up] if is_late else []
    client.join()
    assert answer
    assert sum(later) * 2 >= len(later)  # a machine with too much to do may leave a beacon without its lease
    name = "vllm:iteration_tokens_total_sum"
    wait_for(lambda: total(deployment.metrics(), name) == total(before, name) + 2041, "the prefill in the sum")
