"""The whole stack on a tiny random model: HTTP, scheduling, sampling and text, with next to nothing to compute.

Streams of 128 tokens after 128-token prompts, twice as many requests in a round as there are streams. Iterations are
counted by the servers themselves (`vllm:iteration_tokens_total`, which both sides have), processor time by the system.
A token that is streamed costs its API server something: tokens per API-server core-second is how many it could send if
there were nothing else. Ratios are of our figure to that of the row. 0 is what is not known.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.export_model import write_tiny_model
from tests.benchmarks.report import document, table
from tests.benchmarks.serving import add_ratios, add_side_arguments, enter_sides
from tests.benchmarks.sides import Side, alone
from tests.benchmarks.sse_client import random_prompts, run_load

PROMPT_TOKENS = (128, 128)
OUTPUT_TOKENS = 128
ITERATIONS = "vllm:iteration_tokens_total_count"
CORES = ", cores"  # ends the name of a process's share of a core
SETTLING_S = 0.3  # until what was counted last has reached /metrics


def count(text: str, name: str) -> float:
    """The sum of a counter's series in an exposition."""
    lines = (line.rsplit(" ", 1) for line in text.splitlines() if line.split("{", 1)[0] == name)
    return sum(float(value) for _, value in lines)


def num_iterations(side: Side) -> float:
    time.sleep(SETTLING_S)
    with urllib.request.urlopen(f"{side.url}/metrics", timeout=30) as answer:
        return count(answer.read().decode(), ITERATIONS)


def measure(side: Side, concurrency: int, seed: int) -> dict[str, float]:
    """Measure one round."""
    prompts = random_prompts(2 * concurrency, PROMPT_TOKENS, seed)
    iterations, before = num_iterations(side), side.cpu_s()
    load = run_load(side.url, side.model, prompts, OUTPUT_TOKENS, concurrency)
    spent = {pid: after - before.get(pid, 0.0) for pid, after in side.cpu_s().items()}
    iterations = num_iterations(side) - iterations
    shares: dict[str, float] = {}
    for pid, seconds in spent.items():
        name = f"{side.title(pid)}{CORES}"
        shares[name] = shares.get(name, 0.0) + seconds / load.elapsed_s
    api_server_s = sum(spent[pid] for pid in side.api_server_pids)
    return {
        "tokens_per_s": load.tokens_per_s,
        "iteration_ms": 1e3 * load.elapsed_s / iterations if iterations else 0.0,
        "tokens_per_api_server_core_s": load.tokens_per_s * load.elapsed_s / api_server_s if api_server_s else 0.0,
        "client_cores": load.client_cpu_s / load.elapsed_s,
        **shares,
    }


def compare(sides: Sequence[Side], concurrency: int, num_rounds: int) -> list[dict[str, object]]:
    """Rounds of all sides in turn; a row for each side, medians."""
    rounds: dict[str, list[dict[str, float]]] = {side.name: [] for side in sides}
    for number in range(num_rounds):
        for side in sides:
            with alone(side, sides):
                rounds[side.name].append(measure(side, concurrency, 1000 * concurrency + number))
    return [
        {"side": name, "concurrency": concurrency}
        | {figure: statistics.median(one[figure] for one in done) for figure in done[0]}
        for name, done in rounds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", nargs="+", type=int, default=[64, 128], help="(64 128)")
    add_side_arguments(parser)
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        model = args.compare_vllm[1] if args.compare_vllm else None
        if model is None:
            model = write_tiny_model(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        sides = enter_sides(stack, args, model)
        for side in sides:
            measure(side, 64, -1)  # a warm-up
        rows = [row for concurrency in args.concurrency for row in compare(sides, concurrency, args.rounds)]
    add_ratios(rows, "tokens_per_s", "tokens_per_api_server_core_s")
    figures = {
        "tokens_per_s": ".0f",
        "tokens_per_s_ratio": ".2f",
        "iteration_ms": ".2f",
        "tokens_per_api_server_core_s": ".0f",
        "tokens_per_api_server_core_s_ratio": ".2f",
        "client_cores": ".2f",
    }
    table(
        "Median of rounds",
        (
            "side",
            "concurrency",
            "tokens/s",
            "ratio",
            "iteration, ms",
            "tokens per API-server core-s",
            "ratio",
            "cores: client",
            "the server's processes",
        ),
        [
            (
                row["side"],
                row["concurrency"],
                *(format(row[name], form) for name, form in figures.items()),
                ", ".join(f"{name.removesuffix(CORES)} {row[name]:.2f}" for name in row if name.endswith(CORES)),
            )
            for row in rows
        ],
    )
    document("tiny_stack", rows)


if __name__ == "__main__":
    main()
