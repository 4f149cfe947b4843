"""Bounded loads for a deployment, and what the clients saw of them."""

from __future__ import annotations

import http.client
import json
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import urlsplit

from tests.e2e.harness import Served


class BrokenRequestError(Exception):
    """A request that ended otherwise than whole: refused, or with an error in its stream, or cut off."""


@dataclass(frozen=True)
class Ask:
    """One request: its prompt's token ids, and after how many chunks of the stream the client goes away."""

    prompt: tuple[int, ...]
    max_tokens: int
    leaves_after_chunks: int | None = None


@dataclass(frozen=True)
class Seen:
    """What one client saw: tokens by `usage`, or None when it left or was refused before the end."""

    ask: Ask
    completion_tokens: int | None
    text: str


def asks(count: int, *, prompt_tokens: tuple[int, int], max_tokens: int, vocab: int, seed: int = 0) -> list[Ask]:
    """Random prompts, no two with a common prefix worth caching."""
    source = random.Random(seed)
    lengths = [source.randint(*prompt_tokens) for _ in range(count)]
    return [Ask(tuple(source.randrange(10, vocab) for _ in range(n)), max_tokens) for n in lengths]


def stream(deployment: Served, ask: Ask) -> Seen:
    """One streamed completion; a client that leaves closes its connection in the middle of the stream."""
    url = urlsplit(deployment.url)
    connection = http.client.HTTPConnection(str(url.hostname), url.port, timeout=120)
    body = {
        "prompt": list(ask.prompt),
        "max_tokens": ask.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    texts: list[str] = []
    tokens = None
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise BrokenRequestError(f"{answer.status}: {answer.read().decode()}")
        while line := answer.readline():
            if line.strip() == b"data: [DONE]":
                return Seen(ask, tokens, "".join(texts))
            if not line.startswith(b"data: "):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise BrokenRequestError(str(chunk))
            if chunk.get("usage"):
                tokens = chunk["usage"]["completion_tokens"]
            texts += [choice["text"] for choice in chunk["choices"] if choice["text"]]
            if ask.leaves_after_chunks is not None and len(texts) >= ask.leaves_after_chunks:
                return Seen(ask, None, "".join(texts))
    finally:
        connection.close()
    raise BrokenRequestError("the stream ended without [DONE]")


def run(deployment: Served, requests: Sequence[Ask], *, at_a_time: int) -> list[Seen]:
    """All of them, so many at a time."""
    with ThreadPoolExecutor(at_a_time) as pool:
        return list(pool.map(lambda ask: stream(deployment, ask), requests))
