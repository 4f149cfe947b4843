"""Bad input gets a 4xx in OpenAI's error shape, at once, and costs the engine nothing."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.e2e.harness import Served, served, total


@pytest.fixture(scope="module")
def deployment(tiny_model: Path) -> Iterator[Served]:
    with served(tiny_model, "--api-server-count", "2", "--max-model-len", "512", "--max-num-seqs", "4") as running:
        yield running


COMPLETION = {"prompt": "Hello", "max_tokens": 4}
CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}

BAD_COMPLETIONS: dict[str, tuple[object, int, str]] = {
    "malformed JSON": (b'{"prompt": "a"', 400, ""),
    "empty body": (b"", 400, ""),
    "JSON that is no object": ([1, 2], 400, ""),
    "invalid UTF-8": (b'{"prompt": "\xff\xfe"}', 400, ""),
    "a prompt of the wrong type": (COMPLETION | {"prompt": {"a": 1}}, 400, "prompt"),
    "no prompt": ({"max_tokens": 4}, 400, "prompt"),
    "an empty prompt": (COMPLETION | {"prompt": ""}, 400, "prompt"),
    "an empty list of tokens": (COMPLETION | {"prompt": []}, 400, "prompt"),
    "a token id outside the vocabulary": (COMPLETION | {"prompt": [10**9]}, 400, "prompt"),
    "a negative token id": (COMPLETION | {"prompt": [-1]}, 400, "prompt"),
    "a prompt longer than the context": (COMPLETION | {"prompt": [20] * 600}, 400, "512"),
    "an unknown model": (COMPLETION | {"model": "gpt-5"}, 404, "gpt-5"),
    "negative max_tokens": (COMPLETION | {"max_tokens": -1}, 400, "max_tokens"),
    "max_tokens as text": (COMPLETION | {"max_tokens": "many"}, 400, "max_tokens"),
    "a temperature out of range": (COMPLETION | {"temperature": 7}, 400, "temperature"),
    "a temperature that is no number": (b'{"prompt": "a", "temperature": NaN}', 400, ""),
    "top_p of 0": (COMPLETION | {"top_p": 0}, 400, "top_p"),
    "n of 0": (COMPLETION | {"n": 0}, 400, "n"),
    "n of a million": (COMPLETION | {"n": 10**6}, 400, "n"),
    "too many stop strings": (COMPLETION | {"stop": ["a"] * 100}, 400, "stop"),
    "a parameter known but not supported": (COMPLETION | {"suffix": "x"}, 400, "suffix"),
    "logprobs out of range": (COMPLETION | {"logprobs": 1000}, 400, "logprobs"),
    "a seed out of range": (COMPLETION | {"seed": 2**80}, 400, "seed"),
    "a logit bias out of range": (COMPLETION | {"logit_bias": {"5": 1000}}, 400, "logit_bias"),
    "a logit bias on no token": (COMPLETION | {"logit_bias": {"a": 1}}, 400, "logit_bias"),
    "ten megabytes": (b'{"prompt": "' + b"a" * 10_000_000 + b'"}', 413, ""),
}

BAD_CHATS: dict[str, tuple[object, int, str]] = {
    "no messages": ({"max_tokens": 4}, 400, "messages"),
    "empty messages": (CHAT | {"messages": []}, 400, "messages"),
    "a message without a role": (CHAT | {"messages": [{"content": "a"}]}, 400, "role"),
    "a tool without a name": (CHAT | {"tools": [{"type": "function", "function": {}}]}, 400, "tools"),
    "a form that no grammar has": (CHAT | {"response_format": {"type": "json_schema"}}, 400, "response_format"),
    "an image": (CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400, ""),
}


def assert_refused(deployment: Served, path: str, body: object, status: int, word: str) -> None:
    before = total(deployment.idle_metrics(), "wholebatch:iterations_total")
    answered, answer = deployment.post(path, body, timeout_s=10)
    assert answered == status, answer
    error = answer["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert word in json.dumps(error)
    assert total(deployment.idle_metrics(), "wholebatch:iterations_total") == before


@pytest.mark.parametrize("case", BAD_COMPLETIONS)
def test_a_bad_completion_is_refused(deployment: Served, case: str):
    assert_refused(deployment, "/v1/completions", *BAD_COMPLETIONS[case])


@pytest.mark.parametrize("case", BAD_CHATS)
def test_a_bad_chat_is_refused(deployment: Served, case: str):
    assert_refused(deployment, "/v1/chat/completions", *BAD_CHATS[case])


def test_a_path_that_is_not_there_answers_in_the_same_shape(deployment: Served):
    status, answer = deployment.post("/v1/nothing", {})
    assert (status, set(answer)) == (404, {"error"})


def test_a_field_that_nobody_defines_is_ignored(deployment: Served):
    status, answer = deployment.post("/v1/completions", COMPLETION | {"nobody_knows_me": 1, "ignore_eos": True})
    assert status == 200
    assert answer["usage"]["completion_tokens"] == 4


GARBAGE = (
    b"GET /health HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer a-secret\0\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer a-secret" + b"x" * 9000 + b"\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: many\r\n\r\n",
)


def test_what_is_no_http_is_said_once_a_kind_and_nothing_of_it_is_shown(deployment: Served):
    parts = urlsplit(deployment.url)
    before = deployment.log()
    for raw in GARBAGE * 20:
        with socket.create_connection((str(parts.hostname), int(parts.port or 0)), timeout=10) as connection:
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
            with suppress(ConnectionError):
                while connection.recv(65536):
                    pass
    assert deployment.get("/health") == ""
    said = deployment.log()[len(before) :]
    assert "event=bad_http" in said
    assert "a-secret" not in said
    assert "Traceback" not in said
    assert said.count("\n") <= 2 * 5  # for each API server, a few kinds
