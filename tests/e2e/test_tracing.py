"""OpenTelemetry of a real deployment: every request's spans and histograms arrive; a dead endpoint costs no request."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.e2e.harness import ROOT, Served, served, total, wait_for
from tests.e2e.load import Ask, asks, run, stream
from tests.otlp import Receiver, plain, receiving

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
WORD = "unmistakable"
NAME = "tiny"


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def deployment(tiny_model: Path, receiver: Receiver) -> Iterator[Served]:
    flags = ("--api-server-count", "2", "--max-model-len", "512", "--served-model-name", NAME)
    endpoints = ("--otlp-traces-endpoint", receiver.url, "--otlp-metrics-endpoint", f"{receiver.url}/v1/metrics")
    with pytest.MonkeyPatch.context() as patch:  # the SDK's own knobs reach the API servers
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        patch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "200")
        with served(tiny_model, *flags, *endpoints) as running:
            yield running


def ask(deployment: Served, path: str, body: dict[str, object], headers: dict[str, str] | None = None) -> Any:
    data = json.dumps({"model": NAME, "temperature": 0, **body}).encode()
    all_headers = {"Content-Type": "application/json", **(headers or {})}
    with urllib.request.urlopen(urllib.request.Request(deployment.url + path, data, all_headers), timeout=60) as answer:
        return json.loads(answer.read())


def roots_of(receiver: Receiver, response_id: str) -> list[Span]:
    return [root for root in receiver.roots() if plain(root.attributes)["gen_ai.response.id"] == response_id]


def root_of(receiver: Receiver, response_id: str) -> Span:
    root: Span
    (root,) = wait_for(lambda: roots_of(receiver, response_id), "the request's span", 20)
    return root


def test_a_chat_is_a_span_of_the_callers_trace_with_its_stages_inside(deployment, receiver):
    before_ns = time.time_ns()
    body = {"messages": [{"role": "user", "content": WORD}], "max_tokens": 12, "ignore_eos": True}
    answer = ask(deployment, "/v1/chat/completions", body, {"traceparent": f"00-{TRACE}-{PARENT}-01"})
    after_ns = time.time_ns()
    root = root_of(receiver, answer["id"])
    assert (root.trace_id.hex(), root.parent_span_id.hex(), root.name) == (TRACE, PARENT, f"chat {NAME}")
    children = receiver.children(root)
    assert [child.name for child in children] == ["queue", "prefill", "decode"]
    edges = [root.start_time_unix_nano, *(c.start_time_unix_nano for c in children)]
    edges += [children[-1].end_time_unix_nano, root.end_time_unix_nano]
    assert edges == sorted(edges)
    slack_ns = 2_000_000  # the two clocks are read one after the other
    assert before_ns - slack_ns <= edges[0]
    assert edges[-1] <= after_ns + slack_ns
    attributes = plain(root.attributes)
    assert attributes["gen_ai.request.max_tokens"] == 12
    assert attributes["gen_ai.usage.input_tokens"] == answer["usage"]["prompt_tokens"]
    assert attributes["gen_ai.usage.output_tokens"] == answer["usage"]["completion_tokens"] == 12
    assert attributes["gen_ai.response.finish_reasons"] == ["length"]
    stages = [attributes[f"gen_ai.latency.time_in_{name}"] for name in ("queue", "model_prefill", "model_decode")]
    for child, stage_s in zip(children, stages, strict=True):
        assert (child.end_time_unix_nano - child.start_time_unix_nano) / 1e9 == pytest.approx(stage_s, abs=5e-3)


def test_no_export_has_a_word_of_a_prompt_or_an_answer(deployment, receiver):
    answer = ask(deployment, "/v1/completions", {"prompt": WORD, "max_tokens": 16, "ignore_eos": True, "echo": True})
    root_of(receiver, answer["id"])
    text = answer["choices"][0]["text"]
    assert WORD in text
    for body in receiver.bodies:
        assert WORD.encode() not in body
        assert text.encode() not in body


def test_an_abort_a_stop_string_and_a_list_of_prompts_are_told_as_what_they_were(deployment, receiver):
    known = len(receiver.roots())
    stream(deployment, Ask((5, 6, 7), 400, leaves_after_chunks=2))
    aborted = wait_for(lambda: receiver.roots()[known:], "the aborted request's span", 20)[0]
    assert plain(aborted.attributes)["error.type"] == "abort"
    assert aborted.status.code == 0, "a client that goes is no failure of the server"
    body = {"prompt": "abc", "max_tokens": 60, "ignore_eos": True}
    text = ask(deployment, "/v1/completions", body)["choices"][0]["text"]
    stopped = ask(deployment, "/v1/completions", body | {"stop": [text[len(text) // 2 :][:4]]})
    root = root_of(receiver, stopped["id"])
    assert plain(root.attributes)["gen_ai.response.finish_reasons"] == ["stop"]
    assert [child.name for child in receiver.children(root)] == ["queue", "prefill", "decode"]
    two = ask(deployment, "/v1/completions", {"prompt": ["abc", "abd"], "max_tokens": 4, "ignore_eos": True})
    wait_for(lambda: len(roots_of(receiver, two["id"])) == 2, "a span for each prompt", 20)


def test_the_histograms_count_what_the_deployment_counts(deployment, receiver):
    run(deployment, asks(12, prompt_tokens=(3, 30), max_tokens=8, vocab=200), at_a_time=4)
    samples = deployment.idle_metrics()
    finished = sum(
        total(samples, "vllm:request_success_total", {"finished_reason": r}) for r in ("stop", "length", "repetition")
    )

    def sums(name: str) -> tuple[float, float]:
        metrics = receiver.newest_metrics().get(f"gen_ai.server.{name}", [])
        points = [p for m in metrics for p in m.histogram.data_points if "error.type" not in plain(p.attributes)]
        return sum(p.count for p in points), sum(p.sum for p in points)

    wait_for(lambda: sums("request.duration")[0] == finished, "every finished request in the histogram", 20)
    num_first, first_s = sums("time_to_first_token")
    assert num_first == finished
    assert sums("request.duration")[1] == pytest.approx(
        total(samples, "vllm:e2e_request_latency_seconds_sum"), rel=0.02, abs=0.02
    )
    assert 0 < first_s <= sums("request.duration")[1]
    instances = {
        plain(r.resource.attributes)["service.instance.id"] for m in receiver.metrics for r in m.resource_metrics
    }
    assert {name.rsplit("/", 1)[1] for name in instances} == {"api-server-0", "api-server-1"}


def test_an_endpoint_that_is_down_costs_no_request_and_holds_up_no_end(tiny_model):
    endpoints = ("--otlp-traces-endpoint", "http://127.0.0.1:9", "--otlp-metrics-endpoint", "http://127.0.0.1:9")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        patch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
        with served(tiny_model, "--max-model-len", "512", *endpoints) as deployment:
            requests = asks(20, prompt_tokens=(3, 30), max_tokens=8, vocab=200)
            assert [seen.completion_tokens for seen in run(deployment, requests, at_a_time=4)] == [8] * 20
            faults = {"where": "tracing"}
            wait_for(
                lambda: total(deployment.metrics(), "wholebatch:bulkhead_errors_total", faults), "a counted fault", 20
            )
            began_at = time.monotonic()
            assert deployment.stop() == 0, deployment.log()
            assert time.monotonic() - began_at < 15, "the SDK alone would wait 30 s"
            assert 1 <= deployment.log().count("Failed to export spans batch") <= 2, "once for each reason"


def test_without_the_packages_the_flag_is_one_line_and_exit_code_2():
    program = (
        "import sys; sys.modules['opentelemetry.exporter.otlp.proto.http'] = None; "
        "from engine.serve import main; sys.exit(main(['--otlp-traces-endpoint', 'http://127.0.0.1:4318']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=30)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "pip install 'wholebatch[otel]'" in done.stderr


@pytest.mark.parametrize("url", ["grpc://127.0.0.1:4317", "127.0.0.1:4318", "http://"])
def test_what_is_no_url_for_otlp_over_http_is_refused(url):
    command = [sys.executable, "-m", "engine.serve", "--otlp-traces-endpoint", url]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=30)
    assert done.returncode == 2
    assert "--otlp-traces-endpoint" in done.stderr
