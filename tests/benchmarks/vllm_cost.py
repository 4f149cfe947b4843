"""What our part costs a vLLM: the same vLLM with it and without, in turns on the same machine.

    python -m tests.benchmarks.vllm_cost VENV MODEL [--api-servers 4] [--rounds 6]

MODEL is the tiny one (`export_model --tiny`), so that what is around the model is what is measured. The side whose turn
it is not is stopped. A scrape is one GET of /metrics, one after another, after the loads.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
import urllib.request
from pathlib import Path

from tests.benchmarks.inside_vllm import wait_for_servers
from tests.benchmarks.report import document, table
from tests.benchmarks.sides import VLLM, VLLM_WITH_US, Side, alone, vllm
from tests.benchmarks.sse_client import random_prompts, run_load

OUTPUT_TOKENS = 32
PROMPT_TOKENS = (16, 32)
STREAMS = (64, 128)
NUM_SCRAPES = 100


def tokens_per_s(side: Side, streams: int, seed: int) -> float:
    prompts = random_prompts(4 * streams, PROMPT_TOKENS, seed)
    return run_load(side.url, side.model, prompts, OUTPUT_TOKENS, streams).tokens_per_s


def scrape_ms(side: Side) -> float:
    taken = []
    for _ in range(NUM_SCRAPES):
        began = time.perf_counter()
        with urllib.request.urlopen(f"{side.url}/metrics", timeout=30) as answer:
            answer.read()
        taken.append((time.perf_counter() - began) * 1e3)
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("venv", type=Path, help="where install_vllm.sh has put vLLM")
    parser.add_argument("model", type=Path, help="a Hugging Face directory, the tiny one")
    parser.add_argument("--api-servers", type=int, default=4, help="(4)")
    parser.add_argument("--rounds", type=int, default=6, help="of each load on each side (6)")
    args = parser.parse_args()
    flags = ("--api-server-count", str(args.api_servers))
    with contextlib.ExitStack() as stack:
        sides = {"without": stack.enter_context(vllm(args.venv, args.model, *flags, program=VLLM))}
        sides["with us"] = stack.enter_context(vllm(args.venv, args.model, *flags, program=VLLM_WITH_US))
        wait_for_servers(sides["with us"].url, args.api_servers)
        every = list(sides.values())
        found: dict[tuple[str, int], list[float]] = {(name, streams): [] for name in sides for streams in STREAMS}
        scrapes: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(-1, args.rounds):  # the first warms up
            for streams in STREAMS:
                order = list(sides) if number % 2 else list(reversed(sides))
                for name in order:
                    with alone(sides[name], every):
                        figure = tokens_per_s(sides[name], streams, number)
                    if number >= 0:
                        found[name, streams].append(figure)
            for name, side in sides.items():
                with alone(side, every):
                    scrapes[name].append(scrape_ms(side))
    rows = []
    for streams in STREAMS:
        without, with_us = found["without", streams], found["with us", streams]
        pairs = [b / a for a, b in zip(without, with_us, strict=True)]
        medians = (statistics.median(without), statistics.median(with_us), statistics.median(pairs))
        spread = f"{min(pairs):.3f} to {max(pairs):.3f}"
        rows.append((f"output tokens/s at {streams}", *(f"{median:.4g}" for median in medians), spread))
    each = [statistics.median(scrapes[name]) for name in ("without", "with us")]
    rows.append(("a scrape, ms", *(f"{m:.3g}" for m in each), f"{each[1] / each[0]:.3g}", ""))
    header = ("", "without", "with us", "ratio (median of pairs)", "pairs")
    table(f"vLLM at {args.api_servers} API servers", header, rows)
    document("vllm_cost", {"tokens_per_s": {f"{n} {s}": f for (n, s), f in found.items()}, "scrape_ms": scrapes})


if __name__ == "__main__":
    main()
