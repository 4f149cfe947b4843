"""What the statistics cost a whole deployment: tokens a second with them and with `--disable-log-stats`.

Everything is real but the model: one engine whose runner returns at once, 256 sequences at a time, and one API server,
so that next to nothing else costs time. Both deployments are up at once and take turns; an idle one costs next to
nothing. Beside it the processor time of each process a token, which a busy machine disturbs less than it does tokens a
second.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from contextlib import ExitStack

import psutil

from engine import default_model
from metrics.deployment import API_SERVER, ENGINE
from tests.benchmarks.report import document, table
from tests.benchmarks.sse_client import random_prompts, run_load
from tests.e2e.harness import Served, served

SIDES = {"with statistics": (), "without": ("--disable-log-stats",)}
FLAGS = ("--served-model-name", "m", "--no-enable-prefix-caching", "--api-server-count", "1")
FIGURES = ("tokens_per_s", "engine_us", "api_server_us")


def cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def measure(deployment: Served, sequences: int, tokens: int, seed: int) -> dict[str, float]:
    """One load: tokens a second, and microseconds of processor time a token."""
    pids = [*deployment.pids(ENGINE), *deployment.pids(API_SERVER)]
    before = [cpu_s(pid) for pid in pids]
    load = run_load(deployment.url, "m", random_prompts(sequences, (16, 16), seed), tokens, sequences)
    spent = [(cpu_s(pid) - earlier) / (sequences * tokens) * 1e6 for pid, earlier in zip(pids, before, strict=True)]
    return dict(zip(FIGURES, (load.tokens_per_s, *spent), strict=True))


def median(rounds: Sequence[dict[str, float]], figure: str) -> float:
    return statistics.median(one[figure] for one in rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=256, help="at once (256)")
    parser.add_argument("--tokens", type=int, default=2000, help="of each answer (2000)")
    parser.add_argument("--rounds", type=int, default=6, help="of each side (6)")
    args = parser.parse_args()
    rounds: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with ExitStack() as stack:
        deployments = {
            side: stack.enter_context(
                served(default_model.fetch(), *FLAGS, *flags, module="tests.benchmarks.serve_instant")
            )
            for side, flags in SIDES.items()
        }
        for deployment in deployments.values():
            measure(deployment, args.sequences, 50, 0)  # a warm-up
        for number in range(args.rounds):
            order = list(SIDES) if number % 2 else list(reversed(SIDES))
            for side in order:
                rounds[side].append(measure(deployments[side], args.sequences, args.tokens, number + 1))
    medians = {side: {figure: median(rounds[side], figure) for figure in FIGURES} for side in SIDES}
    ratios = [one["tokens_per_s"] / other["tokens_per_s"] for one, other in zip(*rounds.values(), strict=True)]
    rows = [(side, *(f"{medians[side][figure]:.1f}" for figure in FIGURES)) for side in SIDES]
    header = ("", "tokens/s", "engine, µs of processor time a token", "API server, µs")
    table(f"{args.sequences} sequences, median of {args.rounds} rounds", header, rows)
    print(f"\nwith / without, tokens/s: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    document("log_stats", {"medians": medians, "ratio": statistics.median(ratios), "rounds": rounds})


if __name__ == "__main__":
    main()
