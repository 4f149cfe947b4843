"""What being scraped costs those who are served: inter-token latency with and without 20 scrapes a second.

One deployment of a tiny model under a steady load of streams; phases in which nobody scrapes and phases in which one
client scrapes the public port every 50 ms take turns. Latencies are seen by the streams' client.
"""

from __future__ import annotations

import argparse
import http.client
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from tests.benchmarks.report import document, spread, table
from tests.benchmarks.sse_client import random_prompts, run_load
from tests.e2e.harness import served
from tests.tiny_models import write_tiny_llama

PACE_S = 0.05
STREAMS, TOKENS, PROMPT_TOKENS = 16, 200, (16, 32)
SIDES = ("not scraped", "scraped 20 times a second")


@contextmanager
def scraped(url: str) -> Iterator[list[float]]:
    """Every 50 ms, by a thread of this process, which does nothing else; how many seconds each scrape took."""
    took_s: list[float] = []
    ended = threading.Event()
    address = urlsplit(url).netloc

    def scrape() -> None:
        connection = http.client.HTTPConnection(address, timeout=30)
        due_at = time.monotonic()
        while not ended.wait(max(0.0, due_at - time.monotonic())):
            began = time.monotonic()
            due_at = max(due_at + PACE_S, began)
            connection.request("GET", "/metrics")
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            answer.read()
            took_s.append(time.monotonic() - began)

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield took_s
    finally:
        ended.set()
        thread.join()


def phase(url: str, seed: int, streams: int, tokens: int) -> dict[str, float]:
    """Load the deployment; returns the milliseconds between a stream's tokens."""
    prompts = random_prompts(streams, PROMPT_TOKENS, seed, vocab=500)
    load = run_load(url, "m", prompts, tokens, streams)
    gaps = spread([gap * 1e3 for answer in load.answers for gap in answer.gaps_s])
    return {"itl_p50_ms": gaps["median"], "itl_p99_ms": gaps["p99"], "tokens_per_s": load.tokens_per_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--api-servers", type=int, default=2, help="(2)")
    parser.add_argument("--streams", type=int, default=STREAMS, help=f"at once ({STREAMS})")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"of each stream ({TOKENS})")
    parser.add_argument("--rounds", type=int, default=9, help="of each phase (9)")
    parser.add_argument(
        "--model", type=Path, help="instead of a tiny random one; its vocabulary has to have 320 tokens"
    )
    args = parser.parse_args()
    rounds: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "tiny-llama"
        write_tiny_llama(model)
        flags = ("--served-model-name", "m", "--no-enable-prefix-caching", "--api-server-count", str(args.api_servers))
        with served(model, *flags) as deployment:
            phase(deployment.url, 0, args.streams, args.tokens)  # a warm-up
            for number in range(args.rounds):
                rounds[SIDES[0]].append(phase(deployment.url, 2 * number + 1, args.streams, args.tokens))
                with scraped(deployment.url):
                    rounds[SIDES[1]].append(phase(deployment.url, 2 * number + 2, args.streams, args.tokens))
    figures = tuple(rounds[SIDES[0]][0])
    medians = {side: {f: statistics.median(one[f] for one in rounds[side]) for f in figures} for side in SIDES}
    ratios = [b["itl_p99_ms"] / a["itl_p99_ms"] for a, b in zip(*rounds.values(), strict=True)]
    rows = [(side, *(f"{medians[side][figure]:.2f}" for figure in figures)) for side in SIDES]
    table(f"{args.streams} streams, median of {args.rounds} phases", ("", *figures), rows)
    print(f"\nITL p99, scraped / not: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    document("scrape_under_load", {"medians": medians, "ratio": statistics.median(ratios), "rounds": rounds})


if __name__ == "__main__":
    main()
