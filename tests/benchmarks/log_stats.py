"""What the statistics cost a whole deployment: tokens a second with them and with `--disable-log-stats`.

Everything is real but the model: an engine whose runner returns at once, 256 sequences at a time, and one API server,
so that next to nothing else costs time. Two processes that run the same code differ by some percent, for as long as
they live, and the machine by more from one second to the next. So the deployments are started anew several times, take
turns in random order within each start, the idle ones stopped; and a third, without statistics like the second, shows
what a difference between equals looks like here. Beside tokens a second the processor time of engine and API server
a token, which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
from contextlib import ExitStack
from typing import NamedTuple

from tests.benchmarks.report import document, table
from tests.benchmarks.sides import Side, alone
from tests.benchmarks.token_path import NAME, deployed, spend
from tests.e2e.harness import Served

OFF = ("--disable-log-stats",)
SIDES = {"with statistics": (), "without": OFF, "without, again": OFF}
WARM_UP_TOKENS = 50


class Round(NamedTuple):
    """The figures of one load on one side."""

    tokens_per_s: float
    engine_us: float  # of processor time, a token
    api_server_us: float

    @property
    def us(self) -> float:
        return self.engine_us + self.api_server_us


Rounds = list[dict[str, Round]]


def measure(deployment: Served, sequences: int, tokens: int, seed: int) -> Round:
    spent = spend(deployment, sequences, tokens, seed)
    each_us = 1e6 / (sequences * tokens)
    return Round(spent.load.tokens_per_s, spent.engine_s * each_us, spent.api_server_s * each_us)


def one_start(sequences: int, tokens: int, num_rounds: int, order: random.Random) -> Rounds:
    """Start all sides anew and measure them in turns."""
    rounds: Rounds = []
    with ExitStack() as stack:
        deployments = {}
        for side in order.sample(list(SIDES), len(SIDES)):
            deployments[side] = stack.enter_context(deployed(0.0, SIDES[side]))
        sides = {
            side: Side(name=side, url=deployment.url, model=NAME, pid=deployment.process.pid)
            for side, deployment in deployments.items()
        }
        for deployment in deployments.values():
            measure(deployment, sequences, WARM_UP_TOKENS, 0)
        for number in range(num_rounds):
            rounds.append({})
            for side in order.sample(list(SIDES), len(SIDES)):
                with alone(sides[side], list(sides.values())):
                    rounds[-1][side] = measure(deployments[side], sequences, tokens, number + 1)
    return rounds


def ratio(starts: list[Rounds], figure: str, side: str, other: str) -> tuple[float, float]:
    """One side's figure over the other's: the mean over all starts of each one's median, and its standard error."""
    medians = [
        statistics.median(getattr(one[side], figure) / getattr(one[other], figure) for one in rounds)
        for rounds in starts
    ]
    return statistics.fmean(medians), statistics.stdev(medians) / math.sqrt(len(medians))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=256, help="at once (256)")
    parser.add_argument("--tokens", type=int, default=2000, help="of each answer (2000)")
    parser.add_argument("--starts", type=int, default=8, help="of all deployments, 2 or more (8)")
    parser.add_argument("--rounds", type=int, default=4, help="of each side in each start (4)")
    args = parser.parse_args()
    if args.starts < 2:
        parser.error("one start says nothing of how much starts differ")
    order = random.Random(0)
    starts = [one_start(args.sequences, args.tokens, args.rounds, order) for _ in range(args.starts)]
    medians = {
        side: Round(*map(statistics.median, zip(*(one[side] for rounds in starts for one in rounds), strict=True)))
        for side in SIDES
    }
    header = ("", "tokens/s", "engine, µs of processor time a token", "API server, µs")
    table(
        f"{args.sequences} sequences, median of {args.starts} starts with {args.rounds} rounds each",
        header,
        [(side, *(f"{value:.2f}" for value in median)) for side, median in medians.items()],
    )
    on, off, again = SIDES
    ratios = {
        f"{side} / {other}, {figure}": ratio(starts, figure, side, other)
        for figure in ("tokens_per_s", "us")
        for side, other in ((on, off), (on, again), (again, off))
    }
    rows = [(what, f"{mean:.3f}", f"{error:.3f}") for what, (mean, error) in ratios.items()]
    table("The one over the other", ("", "ratio", "standard error"), rows)
    results = {
        "medians": {side: median._asdict() for side, median in medians.items()},
        "ratio": ratios[f"{on} / {off}, tokens_per_s"][0],
        "ratios": ratios,
        "starts": starts,
    }
    document("log_stats", results)


if __name__ == "__main__":
    main()
