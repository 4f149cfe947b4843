"""The names, labels and bounds that others rely on, spelled a second time; and what every declaration must keep."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metrics.catalogue import METRICS, Kind, Scope
from metrics.catalogue.buckets import BUCKETS, BucketError, bounds_of, check_bounds, one_two_five, parse_overrides
from metrics.exposition import format_value

BY_NAME = {metric.name: metric for metric in METRICS}

# What dashboards, autoscalers and gateways ask vLLM for. Name → kind, labels beyond model_name and engine, buckets.
VLLM = """
num_requests_running gauge
num_requests_waiting gauge
num_requests_waiting_by_reason gauge reason
kv_cache_usage_perc gauge
engine_sleep_state gauge sleep_state
cache_config_info gauge CACHE_CONFIG
prefix_cache_queries_total counter
prefix_cache_hits_total counter
external_prefix_cache_queries_total counter
external_prefix_cache_hits_total counter
mm_cache_queries_total counter
mm_cache_hits_total counter
num_preemptions_total counter
prompt_tokens_total counter
prompt_tokens_by_source_total counter source
prompt_tokens_cached_total counter
prompt_tokens_cached_by_source_total counter source
generation_tokens_total counter
estimated_flops_per_gpu_total counter
estimated_read_bytes_per_gpu_total counter
estimated_write_bytes_per_gpu_total counter
iteration_tokens_total histogram - iteration_tokens
request_success_total counter finished_reason
time_to_first_token_seconds histogram - ttft
inter_token_latency_seconds histogram - itl
request_time_per_output_token_seconds histogram - itl
e2e_request_latency_seconds histogram - latency
request_queue_time_seconds histogram - latency
request_prefill_time_seconds histogram - latency
request_decode_time_seconds histogram - latency
request_inference_time_seconds histogram - latency
request_prompt_tokens histogram - request_tokens
request_generation_tokens histogram - request_tokens
request_prefill_kv_computed_tokens histogram - request_tokens
request_max_num_generation_tokens histogram - request_tokens
request_params_n histogram - n
request_params_max_tokens histogram - request_tokens
request_num_preemptions histogram - preemptions
admission_rejections_total counter reason
""".replace(
    "CACHE_CONFIG",
    "block_size,num_gpu_blocks,cache_dtype,enable_prefix_caching,kv_cache_size_tokens,kv_cache_max_concurrency",
)

LE = {
    "latency": "0.3 0.5 0.8 1.0 1.5 2.0 2.5 5.0 10.0 15.0 20.0 30.0 "
    "40.0 50.0 60.0 120.0 240.0 480.0 960.0 1920.0 7680.0",
    "ttft": "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 "
    "1.0 2.5 5.0 7.5 10.0 20.0 40.0 80.0 160.0 640.0 2560.0",
    "itl": "0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1.0 2.5 5.0 7.5 10.0 20.0 40.0 80.0",
    "iteration_tokens": "1.0 8.0 16.0 32.0 64.0 128.0 256.0 512.0 1024.0 2048.0 4096.0 8192.0 16384.0",
    "request_tokens": "1.0 2.0 5.0 10.0 20.0 50.0 100.0 200.0 500.0 1000.0 2000.0 5000.0",
    "n": "1.0 2.0 5.0 10.0 20.0",
    "preemptions": "1.0 2.0 3.0 4.0 5.0 10.0 20.0",
    "step_time": "0.0005 0.001 0.002 0.004 0.008 0.016 0.032 0.064 0.128 0.256 0.512 1.024 2.048 4.096 8.192 16.384",
    "batch": "1.0 2.0 4.0 8.0 16.0 32.0 64.0 128.0 256.0 512.0 1024.0",
    "http": "0.1 0.5 1.0",
    "http_fine": "0.01 0.025 0.05 0.075 0.1 0.25 0.5 0.75 1.0 1.5 2.0 2.5 3.0 3.5 4.0 4.5 5.0 7.5 10.0 30.0 60.0",
}


def test_every_vllm_metric_is_declared_as_vllm_has_it():
    expected = {}
    for row in VLLM.split("\n"):
        if row:
            name, kind, labels, buckets, *_ = [*row.split(), "-", "-"]
            known = () if labels == "-" else tuple(labels.split(","))
            expected[f"vllm:{name}"] = (kind, known, None if buckets == "-" else buckets)
    declared = {m.name: (m.kind, tuple(label.name for label in m.labels), m.buckets) for m in METRICS}
    assert {name: what for name, what in declared.items() if name.startswith("vllm:")} == expected


def test_every_http_metric_is_declared_as_vllm_has_it():
    declared = {m.name: (m.kind, tuple(label.name for label in m.labels), m.buckets) for m in METRICS}
    assert {name: what for name, what in declared.items() if name.startswith("http_")} == {
        "http_requests_total": ("counter", ("method", "handler", "status"), None),
        "http_request_duration_seconds": ("histogram", ("method", "handler"), "http"),
        "http_request_duration_highr_seconds": ("histogram", (), "http_fine"),
        "http_request_size_bytes": ("summary", ("handler",), None),
        "http_response_size_bytes": ("summary", ("handler",), None),
    }


@pytest.mark.parametrize("family", BUCKETS)
def test_bounds_are_written_exactly_as_vllm_writes_them(family: str):
    assert " ".join(map(format_value, bounds_of(family, 8192, {}))) == LE[family]


def test_every_metric_is_declared_once():
    assert len(BY_NAME) == len(METRICS)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_declaration_keeps_the_rules(metric):
    assert re.fullmatch(r"((vllm|wholebatch):)?[a-z][a-z0-9_]*", metric.name)
    assert metric.name.endswith("_total") or metric.kind is not Kind.COUNTER
    assert (metric.buckets in BUCKETS) == (metric.kind is Kind.HISTOGRAM)
    assert metric.help.endswith(".")
    assert "\n" not in metric.help
    for label in metric.labels:
        assert label.values or metric.scope is Scope.SCRAPE or label.name == "api_server"  # P9: all values known
        assert label.name not in ("model_name", "engine", "process", "le")


def test_values_that_sum_over_a_label_say_so_in_the_same_reasons():
    finished = {label.name: label.values for label in BY_NAME["vllm:request_success_total"].labels}
    ended = {label.name: label.values for label in BY_NAME["wholebatch:sequences_ended_total"].labels}
    assert finished["finished_reason"] == ("stop", "length", "abort", "error", "repetition")
    assert ended["finished_reason"] == (*finished["finished_reason"], "server_lost")


@given(st.integers(1, 10**7))
def test_request_tokens_end_with_the_last_value_not_above_the_context(max_model_len: int):
    bounds = one_two_five(max_model_len)
    assert bounds[0] == 1
    assert bounds[-1] <= max_model_len < bounds[-1] * 2.5
    assert all(int(str(int(bound)).rstrip("0") or 1) in (1, 2, 5) for bound in bounds)


def test_an_override_replaces_a_family_whole():
    overrides = dict(parse_overrides('{"request_tokens": [16, 64], "time_to_first_token": [0.5]}'))
    assert overrides == {"request_tokens": (16.0, 64.0), "ttft": (0.5,)}
    assert bounds_of("request_tokens", 8192, overrides) == (16.0, 64.0)
    assert bounds_of("itl", 8192, overrides) == tuple(BUCKETS["itl"])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        '{"no_such_family": [1]}',
        '{"request_latency": []}',
        '{"request_latency": [2, 1]}',
        '{"request_latency": [1, 1]}',
        '{"request_latency": [0, 1]}',
        '{"request_latency": [1, Infinity]}',
        '{"request_latency": [NaN]}',
        '{"request_latency": ["1"]}',
        '{"request_latency": [true]}',
        '{"request_latency": 1}',
    ],
)
def test_bad_overrides_are_refused_with_the_value(text: str):
    with pytest.raises(BucketError):
        parse_overrides(text)


def test_too_many_bounds_are_refused():
    with pytest.raises(BucketError, match="1 to 200"):
        check_bounds("itl", list(range(1, 300)))
