"""Serving over HTTP: output tokens/s, time to first token and inter-token latency at several concurrencies.

The other sides are vLLM, started here (`--compare-vllm`), our own server with other flags (`--compare-own`), or any
server with OpenAI's completions API that runs already (`--compare-url`): all get the same prompts, in alternating
rounds, and medians are compared. While one is measured, the others that were started here are stopped: one that polls
when it is idle would slow it. Prompts are token ids, so that all compute the same number of tokens; none shares a
beginning with another, so that prefix caches find nothing. Ratios are of our figure to that of the row.

With `--request-rate` requests arrive as in life instead (`arrivals`), with `--goodput` at rates between two that are
bisected for the highest at which nearly all are answered in time.

The share of the roofline is of what this machine allows in float32, measured in the same run (`roofline`). Time to
ready and resident memory, after the load, are those of servers that were started here or whose process is named.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import math
import signal
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine import default_model
from engine.device.weights.gguf_checkpoint import GGUFCheckpoint
from tests.benchmarks import arrivals, roofline
from tests.benchmarks.report import document, table
from tests.benchmarks.sides import Side, alone, ours, running, vllm
from tests.benchmarks.sse_client import Load, random_prompts, run_arrivals, run_load

PROMPT_TOKENS = (134, 200)
OUTPUT_TOKENS = 64
ARRIVALS_SEED = 1
COLUMNS = {
    "tokens_per_s": ("output tokens/s", ".1f"),
    "tokens_per_s_ratio": ("ratio", ".2f"),
    "roofline_share": ("share of roofline", ".0%"),
    "ttft_p50_ms": ("TTFT p50, ms", ".1f"),
    "ttft_p50_ms_ratio": ("ratio", ".2f"),
    "itl_p50_ms": ("ITL p50, ms", ".1f"),
    "itl_p99_ms": ("ITL p99, ms", ".1f"),
}


def quantile_ms(seconds: Sequence[float], quantile: float) -> float:
    ordered = sorted(seconds)
    return 1e3 * ordered[min(len(ordered) - 1, int(len(ordered) * quantile))]


def figures(load: Load) -> dict[str, float]:
    """Work out what is said of one round."""
    gaps = [gap for answer in load.answers for gap in answer.gaps_s] or [0.0]
    return {
        "tokens_per_s": load.tokens_per_s,
        "ttft_p50_ms": quantile_ms([answer.first_s for answer in load.answers], 0.5),
        "itl_p50_ms": quantile_ms(gaps, 0.5),
        "itl_p99_ms": quantile_ms(gaps, 0.99),
    }


def num_requests(concurrency: int, most: int) -> int:
    """In a round: few when they go one by one, else enough to fill the batch several times."""
    return max(concurrency, min(most, 8 if concurrency == 1 else 4 * concurrency))


def add_side_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags that say who is compared with whom."""
    parser.add_argument("--url", help="our server, if it runs already (default: one is started)")
    parser.add_argument("--compare-own", help="start ours once more, with other flags, in one argument")
    parser.add_argument("--compare-url", help="the other side, if it runs already")
    parser.add_argument("--compare-pid", type=int, help="its API server, whose children are the rest of it")
    parser.add_argument(
        "--compare-vllm", type=Path, nargs=2, metavar=("VENV", "MODEL"), help="start vLLM as the other side"
    )
    parser.add_argument("--compare-flags", default="", help="more flags for vLLM, in one argument")
    parser.add_argument("--rounds", type=int, default=3, help="of each side, alternating (3)")
    parser.add_argument(
        "--flags", nargs=argparse.REMAINDER, default=[], help="more flags for the server that is started"
    )


def enter_sides(stack: contextlib.ExitStack, args: argparse.Namespace, model: Path) -> list[Side]:
    """Ours, and what it is compared with. They end with this process, also when it is told to end."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if args.url:
        sides = [dataclasses.replace(running(args.url, "model", None), name="ours")]
    else:
        sides = [stack.enter_context(ours(model, *args.flags))]
    if args.compare_own:
        other = stack.enter_context(ours(model, *args.compare_own.split()))
        sides.append(dataclasses.replace(other, name=f"ours {args.compare_own}"))
    if args.compare_vllm:
        sides.append(stack.enter_context(vllm(*args.compare_vllm, *args.compare_flags.split())))
    if args.compare_url:
        sides.append(running(args.compare_url, "model", args.compare_pid))
    return sides


def warm_up(sides: Sequence[Side]) -> None:
    for side in sides:
        run_load(side.url, side.model, random_prompts(4, PROMPT_TOKENS, -1), OUTPUT_TOKENS, 4)


def compare(sides: Sequence[Side], concurrency: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rounds of all sides in turn; a row for each side, medians."""
    rounds: dict[str, list[dict[str, float]]] = {side.name: [] for side in sides}
    for number in range(args.rounds):
        prompts = random_prompts(num_requests(concurrency, args.requests), PROMPT_TOKENS, 1000 * concurrency + number)
        for side in sides:
            with alone(side, sides):
                load = run_load(side.url, side.model, prompts, OUTPUT_TOKENS, concurrency)
            rounds[side.name].append(figures(load))
    return [
        {"side": name, "concurrency": concurrency}
        | {figure: statistics.median(one[figure] for one in done) for figure in done[0]}
        for name, done in rounds.items()
    ]


def at_rate(side: Side, sides: Sequence[Side], rate: float, seconds: float) -> dict[str, Any]:
    """A row: what one side made of arrivals at this rate."""
    with alone(side, sides):
        load = run_arrivals(side.url, side.model, arrivals.poisson(rate, seconds, ARRIVALS_SEED))
    row = {"side": side.name, "rate": rate, "requests": len(load.answers)} | figures(load)
    row["ttft_p99_ms"] = quantile_ms([answer.first_s for answer in load.answers], 0.99)
    return row | {"good_share": arrivals.good_share(load.answers)}


def arrive(sides: Sequence[Side], args: argparse.Namespace) -> dict[str, Any]:
    """All sides at each rate that is asked for, and the goodput of each if it is asked for."""
    rows = [at_rate(side, sides, rate, args.seconds) for rate in args.request_rate or () for side in sides]
    goodputs: dict[str, float] = {}

    def holds(side: Side, rate: float) -> bool:
        rows.append(at_rate(side, sides, rate, args.seconds))
        return bool(rows[-1]["good_share"] >= arrivals.SHARE)

    if args.goodput:
        low, high = args.goodput
        for side in sides:
            goodputs[side.name] = arrivals.highest(functools.partial(holds, side), low, high, args.trials)
    names = ("tokens_per_s", "ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms")
    table(
        f"Poisson arrivals for {args.seconds:g} s",
        ("side", "requests/s", "requests", *names, "in time"),
        [
            (
                row["side"],
                f"{row['rate']:.2f}",
                row["requests"],
                *(f"{row[n]:.1f}" for n in names),
                f"{row['good_share']:.1%}",
            )
            for row in rows
        ],
    )
    if goodputs:
        table("Goodput", ("side", "requests/s"), [(name, f"{rate:.2f}") for name, rate in goodputs.items()])
    return {"rates": rows, "goodput": goodputs}


def add_ratios(rows: Sequence[dict[str, Any]], *figures: str) -> None:
    """Of the first side's figure to each row's, at the same concurrency; 0 where there is none."""
    for row in rows:
        first = next(one for one in rows if one["concurrency"] == row["concurrency"])
        for figure in figures:
            row[f"{figure}_ratio"] = first[figure] / row[figure] if row[figure] else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8, 32, 128], help="(1 8 32 128)")
    parser.add_argument("--requests", type=int, default=64, help="in a round, at most (64); 8 at concurrency 1")
    parser.add_argument("--request-rate", nargs="+", type=float, metavar="R", help="Poisson arrivals, requests/s")
    parser.add_argument("--goodput", nargs=2, type=float, metavar=("LOW", "HIGH"), help="bisect between two rates")
    parser.add_argument("--seconds", type=float, default=30.0, help="of arrivals at each rate (30)")
    parser.add_argument("--trials", type=int, default=5, help="of the bisection (5)")
    add_side_arguments(parser)
    args = parser.parse_args()
    model = default_model.fetch()
    if args.request_rate or args.goodput:
        with contextlib.ExitStack() as stack:
            sides = enter_sides(stack, args, model)
            warm_up(sides)
            results = arrive(sides, args)
        document("serving", results)
        return
    spec = GGUFCheckpoint(model).spec
    machine, work = roofline.measure(spec), roofline.work_of(spec)
    with contextlib.ExitStack() as stack:
        sides = enter_sides(stack, args, model)
        warm_up(sides)
        rows = [row for concurrency in args.concurrency for row in compare(sides, concurrency, args)]
        costs = [
            {"side": side.name, "ready_s": side.ready_s, "memory_mib": side.memory_mib() or None} for side in sides
        ]
    machine = machine.best_of(roofline.measure(spec))
    for row in rows:
        limit = roofline.limit_tokens_per_s(
            machine,
            work,
            prompt_tokens=sum(PROMPT_TOKENS) / 2,
            output_tokens=OUTPUT_TOKENS,
            concurrency=row["concurrency"],
        )
        row["roofline_tokens_per_s"] = limit
        row["roofline_share"] = row["tokens_per_s"] / limit
    add_ratios(rows, "tokens_per_s", "ttft_p50_ms")
    show(rows, costs, machine)
    document("serving", {"rounds": rows, "costs": costs, "roofline": dataclasses.asdict(machine)})


def show(rows: Sequence[dict[str, Any]], costs: Sequence[dict[str, Any]], machine: roofline.Machine) -> None:
    """Print the tables."""
    table(
        "Median of rounds",
        ("side", "concurrency", *(title for title, _ in COLUMNS.values())),
        [
            (row["side"], row["concurrency"], *(format(row[name], form) for name, (_, form) in COLUMNS.items()))
            for row in rows
        ],
    )
    table(
        "Once",
        ("side", "ready after, s", "resident memory, MiB"),
        [(one["side"], *(f"{one[name] or math.nan:.1f}" for name in ("ready_s", "memory_mib"))) for one in costs],
    )
    peak, read = machine.flops / 1e9, machine.bytes_per_s / 1e9
    print(f"\nThis machine: {peak:.0f} GFLOP/s of float32 products, reads {read:.1f} GB/s.")


if __name__ == "__main__":
    main()
