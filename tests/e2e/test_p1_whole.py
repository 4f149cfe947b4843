"""P1: each iteration histogram has exactly one observation per iteration that ran a batch, at any number of API
servers, with chunked prefill, preemption and aborts. The witness is the engine's own line per iteration, written
from the batch before it runs and not from what is counted."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from tests.e2e.harness import Samples, Served, served, total
from tests.e2e.load import asks, run

LOG_FLAG = "--enable-logging-iteration-details"
HISTOGRAM = "vllm:iteration_tokens_total"


def logged_iterations(deployment: Served) -> list[int]:
    """Scheduled tokens of every iteration, as logged."""
    return [int(n) for n in re.findall(r"event=iteration .*?scheduled_tokens=(\d+)", deployment.log())]


def assert_whole(deployment: Served, samples: Samples) -> None:
    """What P1 and the first two laws say, against the log of iterations."""
    logged = logged_iterations(deployment)
    assert logged
    assert total(samples, f"{HISTOGRAM}_count") == len(logged)
    assert total(samples, "wholebatch:iterations_total") == len(logged)
    assert total(samples, "wholebatch:iteration_scheduled_tokens_count") == len(logged)
    assert total(samples, "wholebatch:iteration_scheduled_tokens_sum") == sum(logged)
    made = ("wholebatch:prompt_tokens_computed_total", "wholebatch:recomputed_tokens_total")
    expected = sum(total(samples, name) for name in (*made, "vllm:generation_tokens_total"))
    assert total(samples, f"{HISTOGRAM}_sum") == expected


@pytest.mark.parametrize("num_api_servers", [1, 4, 8])
def test_every_iteration_is_one_observation_at_any_number_of_api_servers(tiny_model: Path, num_api_servers: int):
    requests = asks(64, prompt_tokens=(100, 200), max_tokens=64, vocab=250)
    with served(tiny_model, "--api-server-count", str(num_api_servers), LOG_FLAG) as deployment:
        seen = run(deployment, requests, at_a_time=32)
        samples = deployment.idle_metrics()
        assert_whole(deployment, samples)
    assert [s.completion_tokens for s in seen] == [64] * 64
    prompt = sum(len(ask.prompt) for ask in requests)
    assert total(samples, f"{HISTOGRAM}_sum") == prompt + 64 * 64
    assert total(samples, "wholebatch:delivered_tokens_total") == 64 * 64
    assert total(samples, "vllm:request_success_total", {"finished_reason": "length"}) == 64


def test_every_chunk_of_a_chunked_prefill_is_in_an_observation(tiny_model: Path):
    requests = asks(16, prompt_tokens=(100, 200), max_tokens=8, vocab=250, seed=1)
    flags = ("--api-server-count", "4", "--long-prefill-token-threshold", "32", LOG_FLAG)
    with served(tiny_model, *flags) as deployment:
        for ask in requests[:2]:
            before = deployment.idle_metrics()
            run(deployment, [ask], at_a_time=1)
            after = deployment.idle_metrics()
            chunks = -(-len(ask.prompt) // 32)
            name = f"{HISTOGRAM}_count"
            assert total(after, name) - total(before, name) == chunks + 8 - 1
        run(deployment, requests[2:], at_a_time=14)
        samples = deployment.idle_metrics()
        assert_whole(deployment, samples)
    assert total(samples, f"{HISTOGRAM}_sum") == sum(len(a.prompt) for a in requests) + 16 * 8
    assert total(samples, "wholebatch:recomputed_tokens_total") == 0


def test_what_preemption_recomputes_is_counted_and_the_sums_stay_exact(tiny_model: Path):
    requests = asks(32, prompt_tokens=(100, 200), max_tokens=64, vocab=250, seed=2)
    flags = ("--api-server-count", "4", "--num-gpu-blocks-override", "64", "--max-model-len", "512", LOG_FLAG)
    with served(tiny_model, *flags, "--no-enable-prefix-caching") as deployment:
        seen = run(deployment, requests, at_a_time=32)
        samples = deployment.idle_metrics()
        assert_whole(deployment, samples)
    assert [s.completion_tokens for s in seen] == [64] * 32
    assert total(samples, "vllm:num_preemptions_total") > 0
    assert total(samples, "wholebatch:recomputed_tokens_total") > 0
    assert total(samples, "wholebatch:prompt_tokens_computed_total") == sum(len(a.prompt) for a in requests)


def test_the_sums_stay_exact_when_half_of_the_clients_leave_midway(tiny_model: Path):
    requests = asks(32, prompt_tokens=(100, 200), max_tokens=400, vocab=250, seed=3)
    requests = [dataclasses.replace(a, leaves_after_chunks=5) if i % 2 else a for i, a in enumerate(requests)]
    with served(tiny_model, "--api-server-count", "4", LOG_FLAG) as deployment:
        seen = run(deployment, requests, at_a_time=32)
        samples = deployment.idle_metrics()
        assert_whole(deployment, samples)
    assert sum(s.completion_tokens == 400 for s in seen) == 16
    assert total(samples, "vllm:request_success_total", {"finished_reason": "abort"}) == 16
    received = total(samples, "wholebatch:received_tokens_total")
    given = total(samples, "wholebatch:delivered_tokens_total") + total(samples, "wholebatch:undelivered_tokens_total")
    assert received == given == total(samples, "vllm:generation_tokens_total")
