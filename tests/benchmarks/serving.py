"""Serving over HTTP: output tokens/s, time to first token and inter-token latency at several concurrencies.

The other side is any server with OpenAI's completions API (`--compare-url`): both get the same prompts, in alternating
rounds, and medians are compared. Prompts are token ids, so that both compute the same number of tokens; none shares a
beginning with another, so that prefix caches find nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import aiohttp

from engine import default_model
from tests.benchmarks.report import document, table
from tests.e2e.harness import served

OUTPUT_TOKENS = 64


@dataclass(frozen=True)
class Answer:
    """One streamed answer, in seconds from its request."""

    first_s: float
    gaps_s: tuple[float, ...]
    num_tokens: int


@dataclass(frozen=True)
class Round:
    """One load on one server."""

    tokens_per_s: float
    answers: Sequence[Answer]

    def ttft_ms(self, quantile: float) -> float:
        return 1e3 * _quantile([a.first_s for a in self.answers], quantile)

    def itl_ms(self, quantile: float) -> float:
        return 1e3 * _quantile([gap for a in self.answers for gap in a.gaps_s] or [0.0], quantile)


def _quantile(values: Sequence[float], quantile: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * quantile))]


def prompts(count: int, seed: int) -> list[list[int]]:
    """About 167 tokens each."""
    source = random.Random(seed)
    return [[source.randrange(300, 40_000) for _ in range(source.randint(134, 200))] for _ in range(count)]


async def ask(session: aiohttp.ClientSession, url: str, model: str, prompt: list[int]) -> Answer:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": OUTPUT_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began, times, num_tokens = time.perf_counter(), [], 0
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if chunk.get("usage"):
                num_tokens = chunk["usage"]["completion_tokens"]
            if chunk["choices"]:
                times.append(time.perf_counter())
    assert num_tokens == OUTPUT_TOKENS, f"{num_tokens} tokens instead of {OUTPUT_TOKENS}"
    gaps = tuple(later - earlier for earlier, later in itertools.pairwise(times))
    return Answer(times[0] - began, gaps, num_tokens)


async def load(url: str, model: str, asked: list[list[int]], concurrency: int) -> Round:
    """All prompts, so many at a time."""
    gate = asyncio.Semaphore(concurrency)
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def one(prompt: list[int]) -> Answer:
            async with gate:
                return await ask(session, url, model, prompt)

        began = time.perf_counter()
        answers = await asyncio.gather(*(one(prompt) for prompt in asked))
        elapsed = time.perf_counter() - began
    return Round(sum(a.num_tokens for a in answers) / elapsed, answers)


async def model_of(url: str) -> str:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/v1/models") as answer:
        name: str = (await answer.json())["data"][0]["id"]
    return name


@contextlib.contextmanager
def ours(url: str | None, flags: Sequence[str]) -> Iterator[str]:
    """A server of our own, unless one is named."""
    if url is not None:
        yield url
        return
    with served(default_model.fetch(), "--no-enable-prefix-caching", *flags, num_threads=None) as deployment:
        yield deployment.url


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server (default: one is started with the default model)")
    parser.add_argument("--compare-url", help="the other side")
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8, 32, 128], help="(1 8 32 128)")
    parser.add_argument("--requests", type=int, default=64, help="in a round, at most (64); 8 at concurrency 1")
    parser.add_argument("--rounds", type=int, default=3, help="of each side, alternating (3)")
    parser.add_argument(
        "--flags", nargs=argparse.REMAINDER, default=[], help="more flags for the server that is started"
    )
    args = parser.parse_args()
    with ours(args.url, args.flags) as url:
        results = asyncio.run(compare(url, args))
    document("serving", results)


async def compare(url: str, args: argparse.Namespace) -> list[dict[str, object]]:
    """Rounds of both sides in turn; a row for each side and concurrency."""
    sides = {"ours": url} | ({"other": args.compare_url} if args.compare_url else {})
    models = {side: await model_of(address) for side, address in sides.items()}
    for side, address in sides.items():
        await load(address, models[side], prompts(2, -1), 2)  # a warm-up
    rows, results = [], []
    for concurrency in args.concurrency:
        count = min(args.requests, 8 if concurrency == 1 else 4 * concurrency, args.requests)
        rounds: dict[str, list[Round]] = {side: [] for side in sides}
        for number in range(args.rounds):
            for side, address in sides.items():
                asked = prompts(max(count, concurrency), 1000 * concurrency + number)
                rounds[side].append(await load(address, models[side], asked, concurrency))
        for side, done in rounds.items():
            row = {
                "side": side,
                "concurrency": concurrency,
                "tokens_per_s": statistics.median(r.tokens_per_s for r in done),
                "ttft_p50_ms": statistics.median(r.ttft_ms(0.5) for r in done),
                "itl_p50_ms": statistics.median(r.itl_ms(0.5) for r in done),
                "itl_p99_ms": statistics.median(r.itl_ms(0.99) for r in done),
            }
            results.append(row)
            rows.append([row["side"], concurrency, *(f"{v:.1f}" for k, v in row.items() if k.endswith(("_s", "_ms")))])
    table(
        "Median of rounds",
        ("side", "concurrency", "output tokens/s", "TTFT p50, ms", "ITL p50, ms", "ITL p99, ms"),
        rows,
    )
    return results


if __name__ == "__main__":
    main()
