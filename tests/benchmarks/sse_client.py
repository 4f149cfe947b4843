"""A cheap client of streamed completions: so that a load on two cores measures the server and not its client.

Raw HTTP/1.1 over asyncio protocols. What a stream sends is kept as it comes, and looked at when the stream has ended:
the status, as many events as were sent, the tokens that the usage names. Any server with OpenAI's completions API will
do that separates events by an empty line of `\\n\\n`.

`run_load` and `run_arrivals` run it in a process of its own, `stream_all` and `stream_arrivals` on the caller's event
loop.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvloop

ROOT = Path(__file__).parent.parent.parent
SUCCESS = b"HTTP/1.1 200"
END_OF_BODY = b"\r\n0\r\n\r\n"  # the last chunk, after the end of the one before it
USAGE = re.compile(rb'"completion_tokens": ?(\d+)')


class LoadError(Exception):
    """An answer that is not what was asked for."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed answer, as its client saw it."""

    first_s: float  # from the request until the first bytes of text
    gaps_s: tuple[float, ...]  # between successive arrivals; one may bring several events
    num_events: int  # of text: neither the one with the usage nor the end
    num_tokens: int  # by the usage


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request, and when it is sent, in seconds after the first."""

    at_s: float
    prompt: list[int]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Load:
    """The answers to a whole load."""

    elapsed_s: float
    client_cpu_s: float
    answers: tuple[Answer, ...]

    @property
    def tokens_per_s(self) -> float:
        return sum(answer.num_tokens for answer in self.answers) / self.elapsed_s


def random_prompts(count: int, lengths: tuple[int, int], seed: int, vocab: int = 40_000) -> list[list[int]]:
    """Token ids; no two prompts share a beginning, so that prefix caches find nothing."""
    source = random.Random(seed)
    return [[source.randrange(300, vocab) for _ in range(source.randint(*lengths))] for _ in range(count)]


class Stream(asyncio.Protocol):
    """One connection, which sends one request after another."""

    def __init__(self) -> None:
        self._received: list[bytes] = []
        self._times: list[float] = []
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self._times.append(time.perf_counter())
        self._received.append(data)
        end = data if len(data) >= len(END_OF_BODY) else b"".join(self._received[-len(END_OF_BODY) :])
        is_error = len(self._received) == 1 and not SUCCESS.startswith(data[: len(SUCCESS)])
        if (end.endswith(END_OF_BODY) or is_error) and not self._ended.done():
            self._ended.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self._ended.done():
            self._ended.set_exception(LoadError(f"the server closed the connection: {error}"))

    async def ask(self, transport: asyncio.WriteTransport, request: bytes) -> Answer:
        self._received, self._times = [], []
        self._ended = asyncio.get_running_loop().create_future()
        began = time.perf_counter()
        transport.write(request)
        await self._ended
        return make_answer(began, self._times, self._received)


def make_answer(began: float, times: Sequence[float], received: Sequence[bytes]) -> Answer:
    """What came, as an answer; LoadError if it is none."""
    whole = b"".join(received)
    if not whole.startswith(SUCCESS):
        raise LoadError(whole[:500].decode(errors="replace"))
    usages = USAGE.findall(whole)
    num_events = whole.count(b"\n\n") - 2
    if not usages or b"data: [DONE]" not in whole or num_events < 1:
        raise LoadError(f"no whole stream with usage: ...{whole[-500:].decode(errors='replace')}")
    # The head may arrive alone, before there is any text.
    first = next(number for number, part in enumerate(received) if b"data: " in part)
    gaps = tuple(later - earlier for earlier, later in itertools.pairwise(times[first:]))
    return Answer(times[first] - began, gaps, num_events, int(usages[-1]))


def make_request(url: str, body: dict[str, object]) -> bytes:
    """Make the bytes of one POST."""
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def make_body(model: str, prompt: Sequence[int], max_tokens: int) -> dict[str, object]:
    """A streamed completion of exactly so many tokens."""
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def stream_arrivals(url: str, model: str, arrivals: Sequence[Arrival]) -> Load:
    """Each request at its instant, on a connection of its own; times to first tokens count from that instant. The
    answers are in the order of arrivals. Raises LoadError."""
    address, loop = urlsplit(url), asyncio.get_running_loop()
    host, port = address.hostname, address.port
    assert host is not None, f"no host in {url}"
    assert port is not None, f"no port in {url}"
    requests = [make_request(url, make_body(model, one.prompt, one.max_tokens)) for one in arrivals]
    began, cpu = time.perf_counter(), time.process_time()

    async def ask_at(at_s: float, request: bytes) -> Answer:
        due = began + at_s
        await asyncio.sleep(due - time.perf_counter())
        transport, stream = await loop.create_connection(Stream, host, port)
        try:
            late_s = time.perf_counter() - due
            answer = await stream.ask(transport, request)
        finally:
            transport.close()
        return dataclasses.replace(answer, first_s=answer.first_s + late_s)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(ask_at(one.at_s, request)) for one, request in zip(arrivals, requests, strict=True)]
    answers = tuple(task.result() for task in tasks)
    for answer, one in zip(answers, arrivals, strict=True):
        if answer.num_tokens != one.max_tokens:
            raise LoadError(f"{answer.num_tokens} tokens instead of {one.max_tokens}")
    return Load(time.perf_counter() - began, time.process_time() - cpu, answers)


async def stream_all(url: str, model: str, prompts: Sequence[Sequence[int]], max_tokens: int, concurrency: int) -> Load:
    """One completion of `max_tokens` for each prompt, so many at a time. Raises LoadError."""
    requests = iter([make_request(url, make_body(model, prompt, max_tokens)) for prompt in prompts])
    address, loop = urlsplit(url), asyncio.get_running_loop()
    assert address.hostname is not None, f"no host in {url}"
    assert address.port is not None, f"no port in {url}"
    connections = [
        await loop.create_connection(Stream, address.hostname, address.port)
        for _ in range(min(concurrency, len(prompts)))
    ]

    async def ask_in_turn(transport: asyncio.WriteTransport, stream: Stream) -> list[Answer]:
        return [await stream.ask(transport, request) for request in requests]

    began, cpu = time.perf_counter(), time.process_time()
    try:
        done = await asyncio.gather(*(ask_in_turn(*connection) for connection in connections))
        elapsed, cpu = time.perf_counter() - began, time.process_time() - cpu
    finally:
        for transport, _ in connections:
            transport.close()
    load = Load(elapsed, cpu, tuple(itertools.chain.from_iterable(done)))
    if wrong := [answer.num_tokens for answer in load.answers if answer.num_tokens != max_tokens]:
        raise LoadError(f"{wrong} tokens instead of {max_tokens}")
    return load


def run_load(url: str, model: str, prompts: Sequence[Sequence[int]], max_tokens: int, concurrency: int) -> Load:
    """`stream_all` in a process of its own. Raises LoadError."""
    wanted = {
        "url": url,
        "model": model,
        "prompts": prompts,
        "max_tokens": max_tokens,
        "concurrency": concurrency,
    }
    return _run(wanted)


def run_arrivals(url: str, model: str, arrivals: Sequence[Arrival]) -> Load:
    """`stream_arrivals` in a process of its own. Raises LoadError."""
    return _run({"url": url, "model": model, "arrivals": [dataclasses.asdict(one) for one in arrivals]})


def _run(wanted: dict[str, Any]) -> Load:
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.sse_client"],
        input=json.dumps(wanted),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    if done.returncode:
        raise LoadError(done.stderr[-2000:])
    raw = json.loads(done.stdout)
    answers = tuple(Answer(a["first_s"], tuple(a["gaps_s"]), a["num_events"], a["num_tokens"]) for a in raw["answers"])
    return Load(raw["elapsed_s"], raw["client_cpu_s"], answers)


def main() -> None:
    wanted = json.load(sys.stdin)
    if "arrivals" in wanted:
        arrivals = [Arrival(**one) for one in wanted["arrivals"]]
        load = uvloop.run(stream_arrivals(wanted["url"], wanted["model"], arrivals))
    else:
        load = uvloop.run(stream_all(**wanted))
    # NOTE: print() loses what a pipe does not take at once where Python's own output is unbuffered.
    with open(sys.stdout.fileno(), "w", closefd=False) as output:
        json.dump(dataclasses.asdict(load), output)


if __name__ == "__main__":
    main()
