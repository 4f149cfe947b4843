"""Readers of a real deployment: its histograms, gateways, Prometheus' discovery and formats, from any API server."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.harness import Served, served, total

FINISHED_HISTOGRAMS = (
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_inference_time_seconds",
    "request_time_per_output_token_seconds",
    "request_prompt_tokens",
    "request_prefill_kv_computed_tokens",
    "request_generation_tokens",
    "request_max_num_generation_tokens",
    "request_params_n",
    "request_params_max_tokens",
    "request_num_preemptions",
)


def ends_at_a_stop_string(deployment: Served) -> None:
    """Of what the model says without one, the end of it: the API server finds it, the engine never knows."""
    prompt = list(range(40, 70))
    whole = deployment.complete(prompt, 12)["choices"][0]["text"]
    answer = deployment.complete(prompt, 12, stop=[whole[len(whole) // 2 :][:2]])
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_every_histogram_has_every_finished_request_those_that_ended_at_a_stop_string_too(tiny_model: Path):
    with served(tiny_model, "--api-server-count", "2") as deployment:
        for _ in range(3):
            ends_at_a_stop_string(deployment)
        samples = deployment.idle_metrics()
    assert total(samples, "vllm:request_success_total", {"finished_reason": "stop"}) == 3
    for name in FINISHED_HISTOGRAMS:
        assert total(samples, f"vllm:{name}_count") == 6, name
