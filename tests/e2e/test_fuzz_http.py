"""Whatever comes to the port: the server answers another client soon, never with a 500, and logs no traceback.

`make test` sends some hundreds of inputs, `make soak` goes on for longer.
"""

from __future__ import annotations

import json
import math
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.e2e.harness import Served, served, total, wait_for

# Measured with 3,000 inputs: 0.24 s on 2 cores with other work on them. A server that is stuck takes far longer.
LONGEST_WAIT_S = 5.0
STEP_S = QUIET_S = 0.02
BODY_TIMEOUT_S = 2.0
OF_ONE_DEPLOYMENT = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])


class Watch:
    """Another client, which asks all the time and notes how long it waits."""

    def __init__(self, deployment: Served) -> None:
        self._deployment = deployment
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self.longest_s = 0.0
        self.faults: list[str] = []

    def _ask(self) -> None:
        while not self._is_over.wait(STEP_S):
            asked_at = time.monotonic()
            try:
                self._deployment.get("/version")
            except OSError as error:
                self.faults.append(repr(error))
            self.longest_s = max(self.longest_s, time.monotonic() - asked_at)

    @contextmanager
    def watching(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._is_over.set()
            self._thread.join()


@pytest.fixture(scope="module")
def deployment(tiny_model: Path) -> Iterator[Served]:
    """One API server, so that whoever asks asks the one that the input went to. What is promised of all inputs
    together is looked at when all have been sent."""
    flags = ("--max-model-len", "256", "--max-num-seqs", "32", "--http-body-timeout", str(BODY_TIMEOUT_S))
    with served(tiny_model, "--api-server-count", "1", *flags) as running:
        before = [(p["role"], p["pid"]) for p in running.deployment()["processes"]]
        watch = Watch(running)
        with watch.watching():
            yield running
        assert watch.faults == []
        assert watch.longest_s < LONGEST_WAIT_S
        assert [(p["role"], p["pid"]) for p in running.deployment()["processes"]] == before
        wait_for(lambda: json.loads(running.get("/load"))["server_load"] == 0, "nothing under way")
        assert "Traceback" not in running.log()
        assert total(running.idle_metrics(), "http_requests_total", {"status": "5xx"}) == 0


def send(deployment: Served, raw: bytes, *, patience_s: float = 30.0) -> bytes:
    """What comes back, if it begins within that time: what is no whole request has no answer."""
    parts = urlsplit(deployment.url)
    answer = b""
    with socket.create_connection((parts.hostname, parts.port), timeout=30) as client, suppress(ConnectionError):
        client.sendall(raw)  # ConnectionError: the server has answered and closed before it was told all
        client.settimeout(patience_s)
        with suppress(TimeoutError):
            while chunk := client.recv(65536):
                answer += chunk
                client.settimeout(QUIET_S)
    return answer


# --- bytes ---

BODY = b'{"prompt": [1, 2, 3], "max_tokens": 2}'
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
REQUESTS = (
    b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: text/plain\r\nAccept-Encoding: gzip\r\n\r\n",
    HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(BODY), BODY),
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY),
    HEAD + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY),
    b"OPTIONS /v1/completions HTTP/1.1\r\nHost: x\r\nOrigin: http://y\r\nAccess-Control-Request-Method: POST\r\n\r\n",
    b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
)
WORDS = (b"\r\n", b"\0", b"\xff", b": ", b" ", b"HTTP/1.1", b"chunked", b"-1", b"9" * 20, b"a" * 9000, b"Host: y\r\n")


@st.composite
def mutated(draw: st.DrawFn, seeds: st.SearchStrategy[bytes]) -> bytes:
    """Bytes of which some are cut out, doubled, replaced or put in."""
    raw = draw(seeds)
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(raw)))
        end = draw(st.integers(start, min(len(raw), start + 40)))
        put = draw(st.one_of(st.just(b""), st.just(raw[start:end] * 2), st.sampled_from(WORDS), st.binary(max_size=20)))
        raw = raw[:start] + put + raw[end:]
    return raw


@OF_ONE_DEPLOYMENT
@given(raw=st.one_of(mutated(st.lists(st.sampled_from(REQUESTS), min_size=1, max_size=3).map(b"".join)), st.binary()))
def test_any_bytes_are_answered_without_a_500(deployment: Served, raw: bytes):
    assert b" 500 " not in send(deployment, raw, patience_s=QUIET_S)


# --- headers ---

NAMES = (
    *("Accept", "Accept-Encoding", "Authorization", "Connection", "Content-Encoding", "Content-Type", "Cookie"),
    *("endpoint-load-metrics-format", "Expect", "Host", "Origin", "Range", "TE", "traceparent", "tracestate"),
    *("Transfer-Encoding", "Upgrade", "X-API-Key", "X-Request-ID", "Access-Control-Request-Headers"),
)
header_names = st.one_of(st.sampled_from(NAMES), st.from_regex(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,30}", fullmatch=True))
header_values = st.one_of(
    st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=60),
    st.sampled_from(["application/json", 'application/json; charset="', "JSON", "TEXT", "gzip;q=nan", "*/*;q=1e999"]),
    st.sampled_from(["a" * 9000, "00-" + "0" * 32 + "-" + "1" * 16 + "-01", "100-continue", "close", "keep-alive"]),
)
PATHS = (
    "POST /v1/completions",
    "GET /metrics",
    "GET /v1/models/x",
    "GET /prometheus/targets",
    "OPTIONS /v1/completions",
)


@OF_ONE_DEPLOYMENT
@given(path=st.sampled_from(PATHS), headers=st.lists(st.tuples(header_names, header_values), max_size=6))
@example(path=PATHS[0], headers=[])
@example(path=PATHS[0], headers=[("Expect", "\x82")])
def test_any_headers_are_answered_without_a_500(deployment: Served, path: str, headers: list[tuple[str, str]]):
    usual = [("Host", "x"), ("Content-Type", "application/json"), ("Content-Length", str(len(BODY)))]
    lines = [f"{path} HTTP/1.1", *(f"{name}: {value}" for name, value in usual + headers), "Connection: close", "", ""]
    answer = send(deployment, "\r\n".join(lines).encode("latin-1") + BODY)
    assert answer.startswith(b"HTTP/1.")
    assert b" 500 " not in answer


# --- bodies ---

COMPLETION: dict[str, Any] = {
    "model": "tiny",
    "prompt": "Hello",
    "max_tokens": 2,
    "n": 2,
    "stop": ["x"],
    "stream": False,
    "stream_options": {"include_usage": True},
    "logprobs": 1,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "min_tokens": 1,
    "seed": 1,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "repetition_penalty": 1.1,
    "logit_bias": {"5": 1},
    "stop_token_ids": [7],
    "echo": False,
    "priority": 0,
    "ignore_eos": False,
}
CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Hello"}, {"role": "user", "content": [{"type": "text", "text": "a"}]}],
    "max_completion_tokens": 2,
    "logprobs": True,
    "top_logprobs": 2,
    "stream": True,
    "chat_template_kwargs": {"a": 1},
}
numbers = st.one_of(
    st.integers(-3, 300),
    st.sampled_from([2**31, -(2**63), 2**64, 10**30, 1e-38, 1e-300, 1e308, -0.0, 8.0, math.inf, -math.inf, math.nan]),
    st.floats(),
)
texts = st.one_of(st.text(max_size=20), st.sampled_from(["\0", "\ud800", "a" * 30_000, "1" * 30_000, "auto", "none"]))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=8,
)


def places(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Of everything that the value holds, by keys and indices."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, one in inner for place in [(*path, key), *places(one, (*path, key))]]


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, bytes]:
    """(path, body): a request in which some values are others."""
    path, usual = draw(st.sampled_from([("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)]))
    body = json.loads(json.dumps(usual))
    # The innermost first: what is put in place of a value is not looked into.
    for *outer, key in sorted(draw(st.sets(st.sampled_from(places(usual)), max_size=3)), key=len, reverse=True):
        reduce(getitem, outer, body)[key] = draw(values)
    body |= draw(st.dictionaries(st.sampled_from([*COMPLETION, *CHAT, "tools", "response_format"]), values, max_size=2))
    raw = json.dumps(body).encode("utf-8", "surrogatepass")
    return path, draw(st.one_of(st.just(raw), mutated(st.just(raw))))


@OF_ONE_DEPLOYMENT
@given(asked=bodies())
def test_any_body_is_answered_with_an_honest_status(deployment: Served, asked: tuple[str, bytes]):
    path, body = asked
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    answer = send(deployment, f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    status = int(answer.split(b" ", 2)[1])
    assert status in (200, 400, 404), answer
    if status != 200:
        error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        assert set(error) == {"message", "type", "param", "code"}
    assert b"engine_lost" not in answer
