"""The frame of `metrics.top`: its figures, its picture, and the program over HTTP."""

from __future__ import annotations

import http.server
import io
import json
import math
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from metrics.top import terminal as top
from metrics.top.figures import Figures, work_out
from metrics.top.view import bar, number, render, seconds, sparkline
from metrics.top.window import Scrape, Window

ENGINE, SERVER = {"engine": "0"}, {"process": "api-server-0"}
GRANT = {"term": [2, 3], "api_server": 1, "incarnation": 1}
TABLE: dict[str, Any] = {
    "facts": {"model_name": "a-model"},
    "processes": [
        {"role": "supervisor", "index": 0, "incarnation": 1, "pid": 9, "state": "ready"},
        {"role": "engine", "index": 0, "incarnation": 2, "pid": 10, "state": "ready"},
        {"role": "api-server", "index": 0, "incarnation": 1, "pid": 11, "state": "ready"},
        {"role": "api-server", "index": 1, "incarnation": 1, "pid": 12, "state": "starting"},
    ],
    "exporters": [{"engine": 0, "grant": GRANT}],
}


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


def samples(n: float) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """A deployment that has run n iterations: 8 of every 10 decode; each generates 4 tokens and takes 20 ms."""
    return {
        key("wholebatch:exporter_up", **ENGINE): 1.0,
        key("vllm:num_requests_running", **ENGINE): 4.0,
        key("vllm:num_requests_waiting", **ENGINE): 1.0,
        key("vllm:kv_cache_usage_perc", **ENGINE): 0.5,
        key("vllm:generation_tokens_total", **ENGINE): 4 * n,
        key("wholebatch:iterations_total", phase="decode", **ENGINE): 0.8 * n,
        key("wholebatch:iterations_total", phase="mixed", **ENGINE): 0.2 * n,
        key("wholebatch:iterations_total", phase="prefill", **ENGINE): 0.0,
        key("vllm:iteration_tokens_total_bucket", le="8.0", **ENGINE): n,
        key("vllm:iteration_tokens_total_bucket", le="+Inf", **ENGINE): n,
        key("vllm:iteration_tokens_total_sum", **ENGINE): 6 * n,
        key("vllm:iteration_tokens_total_count", **ENGINE): n,
        key("wholebatch:iteration_duration_seconds_sum", phase="decode", **ENGINE): 0.02 * n,
        key("wholebatch:iteration_duration_seconds_count", phase="decode", **ENGINE): n,
        key("vllm:num_preemptions_total", **ENGINE): n / 10,
        key("vllm:prefix_cache_queries_total", **ENGINE): n,
        key("vllm:prefix_cache_hits_total", **ENGINE): n / 4,
        key("vllm:request_success_total", finished_reason="stop", **ENGINE): n / 10,
        key("vllm:time_to_first_token_seconds_bucket", le="0.1", **ENGINE): 0.0,
        key("vllm:time_to_first_token_seconds_bucket", le="0.2", **ENGINE): n,
        key("vllm:time_to_first_token_seconds_bucket", le="+Inf", **ENGINE): n,
        key("vllm:time_to_first_token_seconds_sum", **ENGINE): n / 8,
        key("vllm:time_to_first_token_seconds_count", **ENGINE): n,
        key("vllm:e2e_request_latency_seconds_bucket", le="0.3", **ENGINE): n,
        key("vllm:e2e_request_latency_seconds_bucket", le="+Inf", **ENGINE): n,
        key("process_cpu_seconds_total", **SERVER): n / 200,
        key("process_resident_memory_bytes", **SERVER): 64.0 * 2**20,
        key("wholebatch:audit_violations_total", law="tokens"): 0.0,
        key("wholebatch:audit_imbalance_tokens", law="tokens"): 0.0,
    }


OWN = {key("wholebatch:api_server_requests_in_flight", **ENGINE): 5.0, key("http_requests_total", status="2xx"): 0.0}


def window(before: float | None, after: float, seconds: float = 2.0) -> Window:
    return Window(None if before is None else Scrape(samples(before), 0.0), Scrape(samples(after), seconds))


def text(figures: Figures, *, width: int = 100, **more: Any) -> str:
    written = io.StringIO()
    console = Console(width=width, file=written, force_terminal=False)
    console.print(render(figures, "http://here", width=width, **more))
    return written.getvalue()


def test_an_engine_has_the_rates_and_means_of_the_window():
    (engine,) = work_out(window(100, 200), {}, TABLE).engines
    assert (engine.running, engine.waiting, engine.kv_usage) == (4, 1, 0.5)
    assert engine.generated_per_s == 200
    assert engine.iterations_per_s == pytest.approx(50)
    assert engine.tokens_per_iteration == 6
    assert engine.seconds_per_iteration == pytest.approx(0.02)
    assert engine.phases == pytest.approx({"prefill": 0, "decode": 0.8, "mixed": 0.2})
    assert (engine.preemptions, engine.cache_hits) == (10, 0.25)
    assert (engine.process.incarnation, engine.exporter) == (2, "1 term 2.3")


def test_latencies_iterations_and_ends_are_of_the_window():
    figures = work_out(window(100, 200), {}, TABLE)
    ttft = figures.latencies[0]
    assert (ttft.what, ttft.count, ttft.mean) == ("TTFT", 100, 0.125)
    assert ttft.quantiles == pytest.approx((0.15, 0.19, 0.199))
    assert figures.iteration_buckets == [(8.0, 100.0), (math.inf, 0.0)]
    assert figures.finished == {"stop": 10.0}


def test_an_engine_whose_series_nobody_exports_is_unknown_and_said_to_be():
    later = {name: value for name, value in samples(200).items() if ("engine", "0") not in name[1]}
    later[key("wholebatch:exporter_up", **ENGINE)] = 0.0
    figures = work_out(Window(Scrape(samples(100), 0.0), Scrape(later, 1.0)), {}, TABLE)
    (engine,) = figures.engines
    assert engine.exporter == "nobody"
    assert [engine.running, engine.generated_per_s, engine.phases, engine.tokens_per_iteration] == [None] * 4
    assert "nobody" in text(figures)


def test_an_api_server_is_what_its_own_port_says_and_unknown_without():
    own = {0: Window(Scrape(OWN, 0.0), Scrape(OWN | {key("http_requests_total", status="2xx"): 6.0}, 2.0))}
    first, second = work_out(window(100, 200), own, TABLE).servers
    assert (first.in_flight, first.requests_per_s, first.process.cpu) == (5, 3, 0.25)
    assert (second.in_flight, second.process.state) == (None, "starting")


def numbers(thing: Any) -> Iterator[float]:
    """Every figure in there."""
    if is_dataclass(thing):
        for field in fields(thing):
            yield from numbers(getattr(thing, field.name))
    elif isinstance(thing, dict):
        yield from numbers(list(thing.values()))
    elif isinstance(thing, list | tuple):
        for part in thing:
            yield from numbers(part)
    elif isinstance(thing, float | int):
        yield float(thing)


KEYS = [*samples(1)]
ANY_SAMPLES = st.dictionaries(st.sampled_from(KEYS), st.floats(0, 1e12), max_size=len(KEYS))


@settings(max_examples=200)
@given(before=ANY_SAMPLES, after=ANY_SAMPLES, elapsed=st.floats(0.01, 100))
def test_whatever_two_scrapes_hold_no_figure_is_negative_and_the_frame_fits(before, after, elapsed):
    figures = work_out(Window(Scrape(before, 0.0), Scrape(after, elapsed)), {}, TABLE)
    assert all(value >= 0 for value in numbers(figures))
    for width in (79, 80, 99, 100):
        assert max(map(len, text(figures, width=width).splitlines())) <= width


@pytest.mark.parametrize("width", [80, 100])
def test_nothing_is_cut_off_in_a_terminal_of_80_columns(width: int):
    figures = work_out(window(1000, 20000), {}, TABLE)
    shown = text(figures, width=width)
    assert "…" not in shown
    whole = ("ready #2", "run", "wait", "KV cache", "preempt", "1 term 2.3", "pre·dec·mix", "0·80·20", "≤ 8")
    for words in (*whole, "all 1 laws hold", "end to end", "delivered tok/s", "memory", "starting"):
        assert words in shown, words
    engine_rows = [line for line in shown.splitlines() if line.strip("│ ").startswith("0 ")]
    assert len(engine_rows) == {80: 3, 100: 2}[width]  # engine 0, in two tables or one, and API server 0


def test_a_terminal_that_is_too_narrow_is_told_so():
    assert text(work_out(window(100, 200), {}, TABLE), width=79) == (
        "metrics.top needs 80 columns; this terminal has 79.\n"
    )


def test_an_api_server_that_does_not_answer_is_not_shown_as_ready():
    figures = work_out(window(100, 200), {}, TABLE, {0})
    assert [server.is_silent for server in figures.servers] == [True, False]
    (row,) = [line for line in text(figures).splitlines() if " 11 " in line]
    assert "no answer" in row
    assert "ready" not in row


def test_a_deployment_started_anew_shows_the_present_and_no_rate():
    (engine,) = work_out(window(1000, 10), {}, TABLE).engines
    assert (engine.running, engine.generated_per_s, engine.iterations_per_s) == (4, None, None)


def test_the_frame_says_the_figures():
    shown = text(work_out(window(100, 200), {}, TABLE), history=[1.0, 2.0])
    for words in ("a-model", "http://here", "200/s", "0·80·20", "1 term 2.3", "150ms", "<300ms", "stop 10", "64M"):
        assert words in shown, words
    assert "all 1 laws hold" in shown
    assert "ready #2" in shown, "an engine that was started again is seen to have been"


def test_a_violated_law_and_an_unreachable_server_are_said():
    broken = samples(200) | {key("wholebatch:audit_violations_total", law="tokens"): 3.0}
    broken[key("wholebatch:audit_imbalance_tokens", law="tokens")] = 7.0
    figures = work_out(Window(None, Scrape(broken, 0.0)), {}, TABLE)
    assert "VIOLATED tokens by 7 (3 times)" in text(figures)
    old = text(figures, trouble="for 3 s: refused" + "." * 200)
    assert "NOT LIVE" in old
    assert "for 3 s: refused" in old
    assert max(map(len, old.splitlines())) <= 100


@pytest.mark.parametrize(
    ("value", "said"),
    [(None, "–"), (0.0, "0"), (0.0421, "0.04"), (12.34, "12.3"), (999.6, "1.00k"), (999.4, "999"), (4.0, "4")],
)
def test_numbers_have_at_most_three_digits(value, said):
    assert number(value) == said


@pytest.mark.parametrize(
    ("value", "said"), [(None, "–"), (0.0, "0s"), (0.00074, "740µs"), (0.0234, "23.4ms"), (1.2, "1.20s")]
)
def test_seconds_have_the_unit_that_suits(value, said):
    assert seconds(value) == said


def test_bars_and_lines_are_as_long_as_they_should_be():
    assert [bar(v, 2) for v in (None, 0, 0.25, 0.5, 1, 7)] == ["  ", "  ", "▌ ", "█ ", "██", "██"]
    assert (sparkline([]), sparkline([0.0]), sparkline([0.0, 7.0, 3.5])) == ("", "▁", "▁█▅")


# --- the program ---


@contextmanager
def answering(pages: dict[str, tuple[int, str]]) -> Iterator[str]:
    """A server on loopback that has these pages."""

    class Pages(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = pages.get(self.path, (404, "no such page"))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


METRICS = 'wholebatch:exporter_up{engine="0"} 1\nvllm:num_requests_running{engine="0"} 4\n'


def test_once_prints_one_frame_and_succeeds(capsys):
    with answering({"/metrics/engines": (200, METRICS), "/deployment": (200, json.dumps(TABLE))}) as url:
        assert top.main(["--url", f"{url}/metrics", "--once", "--interval", "0.05"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("engines") == 1
    assert "1 term 2.3" in shown


def test_an_admin_port_is_asked_for_what_is_an_api_servers_own():
    own = 'wholebatch:api_server_requests_in_flight{engine="0"} 3\nvllm:num_requests_running{engine="0"} 4\n'
    with answering({"/metrics": (200, own)}) as admin_url:
        rows = [row | {"admin_url": admin_url} for row in TABLE["processes"] if row["role"] == "api-server"]
        rows[1]["admin_url"] = "http://127.0.0.1:9"
        table = json.dumps(TABLE | {"processes": rows})
        with answering({"/metrics/engines": (200, METRICS), "/deployment": (200, table)}) as url:
            found = top.look(url)
    assert [*found.own] == [0], "the port that nobody answers is left out"
    assert found.own[0].total("wholebatch:api_server_requests_in_flight") == 3
    assert found.own[0].total("vllm:num_requests_running") is None


def test_an_admin_port_that_takes_a_connection_and_says_nothing_is_silent_and_one_that_is_not_there_is_not():
    with socket.create_server(("127.0.0.1", 0)) as frozen:
        rows = [row | {"admin_url": "http://127.0.0.1:9"} for row in TABLE["processes"] if row["role"] == "api-server"]
        rows[0]["admin_url"] = f"http://127.0.0.1:{frozen.getsockname()[1]}"
        table = json.dumps(TABLE | {"processes": rows})
        with answering({"/metrics/engines": (200, METRICS), "/deployment": (200, table)}) as url:
            found = top.look(url)
    assert (found.own, found.silent) == ({}, {0})


@pytest.mark.parametrize(
    "pages",
    [
        {},
        {"/deployment": (503, '{"error":\n"starting"}')},
        {"/deployment": (200, "no JSON")},
        {"/deployment": (200, json.dumps(TABLE)), "/metrics/engines": (200, "}{ 1 2 3")},
        {"/deployment": (200, json.dumps({"processes": [1]})), "/metrics/engines": (200, METRICS)},
    ],
)
def test_what_is_no_deployment_is_one_line_and_exit_code_2(pages, capsys):
    with answering(pages) as url:
        assert top.main(["--url", url, "--once"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert url in captured.err


def test_a_server_that_is_not_there_is_one_line_and_exit_code_2(capsys):
    assert top.main(["--url", "127.0.0.1:9", "--once"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
