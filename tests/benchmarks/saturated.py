"""What an API server still answers while its engine makes more tokens than it can write: scrapes, and new requests.

A real deployment of one API server, whose engine has no model and makes tokens as fast as it can, for 256 streams that
begin at once. Meanwhile somebody scrapes every 50 ms. With the engine's messages always waiting to be read, whatever
else the API server does has to get its turn.
"""

from __future__ import annotations

import argparse
import statistics

from tests.benchmarks.report import document, table
from tests.benchmarks.scrape_under_load import scraped
from tests.benchmarks.sse_client import random_prompts, run_load
from tests.benchmarks.token_path import NAME, SHORT, deployed
from tests.e2e.harness import Served


def measure(deployment: Served, streams: int, tokens: int, seed: int) -> dict[str, float]:
    """Of one load, in milliseconds but for the throughput."""
    prompts = random_prompts(streams, (SHORT, SHORT), seed)
    with scraped(deployment.url) as took_s:
        load = run_load(deployment.url, NAME, prompts, tokens, streams)
    first_s = [answer.first_s for answer in load.answers]
    return {
        "tokens_per_s": load.tokens_per_s,
        "ttft_p50_ms": statistics.median(first_s) * 1e3,
        "ttft_max_ms": max(first_s) * 1e3,
        "scrape_max_ms": max(took_s) * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256, help="at once (256)")
    parser.add_argument("--tokens", type=int, default=2000, help="of each stream (2000)")
    parser.add_argument("--rounds", type=int, default=5, help="(5)")
    args = parser.parse_args()
    with deployed(0.0, ()) as deployment:
        measure(deployment, args.streams, SHORT, 0)  # a warm-up
        rounds = [measure(deployment, args.streams, args.tokens, number + 1) for number in range(args.rounds)]
    figures = tuple(rounds[0])
    table(
        f"One API server, {args.streams} streams of {args.tokens} tokens",
        ("", *figures),
        [
            (what, *(f"{of([one[figure] for one in rounds]):.0f}" for figure in figures))
            for what, of in (("median", statistics.median), ("least", min), ("most", max))
        ],
    )
    document("saturated", rounds)


if __name__ == "__main__":
    main()
