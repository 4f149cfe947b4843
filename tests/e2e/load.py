"""Bounded loads for a deployment, steady ones, and what the clients saw of them."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from tests.e2e.harness import Served


class BrokenRequestError(Exception):
    """A request that ended otherwise than whole: refused, or with an error in its stream, or cut off."""


BROKEN = (BrokenRequestError, ConnectionError, http.client.HTTPException, TimeoutError)


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


class Clients:
    """A steady load: each client asks one request after another until `stop`.

    The model decodes greedily, so every prompt has one right answer: the first that any client got."""

    def __init__(self, deployment: Served, requests: Sequence[Ask]) -> None:
        self.finished = 0
        self.tokens = 0  # by `usage`, of finished requests
        self.broken: list[str] = []  # why, of every request that was lost or refused
        self.different: list[str] = []  # answers that were not the right one
        self._deployment = deployment
        self._asks = requests
        self._lock = threading.Lock()
        self._ends = threading.Event()
        self._answers: dict[int, str] = {}
        self._threads: list[threading.Thread] = []

    def start(self, count: int) -> None:
        for number in range(count):
            thread = threading.Thread(target=self._ask, args=(random.Random(number),), daemon=True)
            self._threads.append(thread)
            thread.start()

    def end(self) -> None:
        """No client asks again."""
        self._ends.set()

    def stop(self) -> None:
        """After every client's last answer."""
        self.end()
        for thread in self._threads:
            thread.join(150)
            assert not thread.is_alive(), "a client hangs: its request was neither answered nor ended"

    def broken_kinds(self) -> dict[str, int]:
        """How many requests broke, by the beginning of what the client was told."""
        return dict(Counter(why[:60] for why in self.broken))

    def _ask(self, source: random.Random) -> None:
        while not self._ends.is_set():
            number = source.randrange(len(self._asks))
            try:
                seen = stream(self._deployment, self._asks[number])
            except BROKEN as error:
                with self._lock:
                    self.broken.append(f"{type(error).__name__}: {error}")
                time.sleep(0.02)  # a refused client comes back, and does not spin
                continue
            with self._lock:
                self.finished += 1
                self.tokens += seen.completion_tokens or 0
                right = self._answers.setdefault(number, seen.text)
                if right != seen.text:
                    self.different.append(f"prompt {number}: {seen.text!r}, not {right!r}")


@contextmanager
def steady_load(deployment: Served, requests: Sequence[Ask], count: int) -> Iterator[Clients]:
    """So many clients at work; all have their answers on leaving."""
    clients = Clients(deployment, requests)
    clients.start(count)
    try:
        yield clients
    finally:
        clients.stop()
