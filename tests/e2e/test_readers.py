"""Readers of a real deployment: its histograms, gateways, Prometheus' discovery and formats, from any API server."""

from __future__ import annotations

import gzip
import http.client
import json
import urllib.request
from pathlib import Path

from tests.e2e.harness import Served, parse, served, total
from tests.e2e.load import asks, run

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


def test_prompt_tokens_a_request_are_those_of_one_prompt_whatever_n_is(tiny_model: Path):
    """What a dashboard of vLLM's divides counts in one unit: each of n sequences."""
    with served(tiny_model, "--api-server-count", "2") as deployment:
        deployment.complete(list(range(40, 59)), 5, n=3, ignore_eos=True)
        samples = deployment.idle_metrics()
    assert total(samples, "vllm:prompt_tokens_total") == 3 * 19
    assert total(samples, "vllm:request_success_total") == 3
    assert total(samples, "vllm:request_prompt_tokens_sum") == 3 * 19
    assert total(samples, "vllm:request_generation_tokens_sum") == total(samples, "vllm:generation_tokens_total") == 15
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_generation_tokens"):
        assert total(samples, f"vllm:{name}_count") == 3, name
    assert total(samples, "vllm:request_params_n_count") == 1
    assert total(samples, "wholebatch:request_ended_total") == 1
    assert total(samples, "wholebatch:request_latency_seconds_count") == 1
    assert total(samples, "wholebatch:request_output_tokens_sum") == 15


def targets(deployment: Served) -> list[tuple[str, str, str]]:
    """(instance, address, path) of each."""
    groups = json.loads(deployment.get("/prometheus/targets"))
    return [(g["labels"]["instance"], g["targets"][0], g["labels"]["__metrics_path__"]) for g in groups]


def raw(deployment: Served, method: str, path: str, **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
    """A connection of its own: any API server may accept it."""
    connection = http.client.HTTPConnection(deployment.url.removeprefix("http://"), timeout=30)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer, answer.read()
    finally:
        connection.close()


def test_readers_find_the_same_whole_whichever_api_server_answers(tiny_model: Path):
    blocks = ("--num-gpu-blocks-override", "64", "--max-model-len", "512")
    with served(tiny_model, "--api-server-count", "3", "-dp", "2", *blocks) as deployment:
        run(deployment, asks(16, prompt_tokens=(20, 60), max_tokens=8, vocab=250), at_a_time=8)
        whole = deployment.idle_metrics()
        assert len({deployment.get("/prometheus/targets") for _ in range(12)}) == 1
        scrapes = {i: deployment.metrics(f"http://{address}{path}") for i, address, path in targets(deployment)}
        pools = {deployment.get("/metrics/pool") for _ in range(12)}
        answer, body = raw(deployment, "GET", "/metrics?name[]=vllm:num_requests_running", Accept_Encoding="gzip")
        assert answer.getheader("Content-Encoding") == "gzip"
        head, nothing = raw(deployment, "HEAD", "/metrics")
    parts = ("api-server-0", "api-server-1", "api-server-2", "engine-0", "engine-1", "processes")
    assert set(scrapes) == {f"{deployment.url.removeprefix('http://')}/{part}" for part in parts}
    for (name, labels), value in whole.items():
        if name.startswith(("vllm:", "http_")) and name.endswith(("_total", "_bucket", "_sum", "_count")):
            summed = sum(samples.get((name, labels), 0.0) for samples in scrapes.values())
            assert abs(summed - value) <= 1e-9 * max(1.0, abs(value)), (name, labels)
    (pool,) = pools
    samples = parse(pool)
    assert total(samples, "vllm:num_requests_running") == total(samples, "vllm:num_requests_waiting") == 0
    assert total(samples, "vllm:cache_config_info", {"num_gpu_blocks": "128"}) == 1
    restricted = parse(gzip.decompress(body).decode())
    assert {dict(labels)["engine"] for _, labels in restricted} == {"0", "1"}
    assert {name for name, _ in restricted} == {"vllm:num_requests_running"}
    assert (head.status, nothing) == (200, b"")


def test_a_router_with_a_fixed_path_reads_the_whole_deployment_whether_it_keeps_the_first_or_the_last_sample(
    tiny_model: Path,
):
    with served(tiny_model, "-dp", "2", "--metrics-view", "pool") as deployment:
        run(deployment, asks(8, prompt_tokens=(20, 60), max_tokens=8, vocab=250), at_a_time=8)
        deployment.idle_metrics()
        lines = deployment.get("/metrics").splitlines()
        cache = parse(deployment.get("/metrics/pool"))
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
        samples = [line for line in lines if line.startswith(f"{name}{{")]
        assert len(samples) == 1, samples
        assert float(samples[0].rpartition(" ")[2]) == total(cache, name)
    assert {
        dict(labels)["engine"] for name, labels in parse("\n".join(lines)) if name == "vllm:generation_tokens_total"
    } == {
        "0",
        "1",
    }


def test_an_answer_reports_the_pools_load_where_the_request_asks_for_it(tiny_model: Path):
    with served(tiny_model) as deployment:
        deployment.idle_metrics()  # by then every engine was heard
        body = json.dumps({"prompt": [40, 41, 42], "max_tokens": 2}).encode()
        headers = {"Content-Type": "application/json", "endpoint-load-metrics-format": "JSON"}
        request = urllib.request.Request(f"{deployment.url}/v1/completions", body, headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            kind, _, report = str(answer.headers["endpoint-load-metrics"]).partition(" ")
    assert (kind, set(json.loads(report)["named_metrics"])) == ("JSON", {"kv_cache_usage_perc", "num_requests_waiting"})


def test_at_the_end_every_api_server_leaves_each_engine_once_and_comes_back_to_none(tiny_model: Path):
    with served(tiny_model, "--api-server-count", "4", "-dp", "2") as deployment:
        assert deployment.stop() == 0
        log = deployment.log()
    assert log.count("event=engine_connected") == log.count("event=engine_left") == 8
    assert log.count("event=hello") == 8
    assert "event=engine_goodbye" not in log
