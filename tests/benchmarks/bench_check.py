"""`make bench-check`: ratios between figures of one run against recorded bounds; exit code 1 when one is broken.

    python -m tests.benchmarks.bench_check [--as-avx2] [--only model_step]

Some bounds are of one instruction set alone; `--as-avx2` has any processor play one with AVX2 alone.

Ratios, because a machine's speed cancels in them; bounds at some distance from what was measured, because its noise
does not. They guard against what makes something several times slower, not against the loss of a few percent. A bound
that is broken is measured once more before it counts: noise seldom strikes twice in the same place.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from engine.device.kernels.compiled import INSTRUCTION_SET
from tests.benchmarks.report import document, table
from tests.instruction_sets import as_avx2

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True, slots=True)
class Bound:
    """The least that a ratio between two figures in a benchmark's results may be."""

    what: str
    recorded: float  # what it was when the bound was set
    least: float
    ratio: Callable[[Any], float]
    instruction_set: str | None = None  # of the kernels: only there; None: everywhere


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One command, and the bounds on what its JSON document says."""

    name: str
    arguments: tuple[str, ...]
    bounds: tuple[Bound, ...]


def find(rows: Sequence[dict[str, Any]], figure: str, **wanted: object) -> float:
    """One figure of the row that has these values."""
    return float(next(row[figure] for row in rows if all(row[key] == value for key, value in wanted.items())))


def record_us(results: dict[str, Any], batch: int) -> float:
    return float(results[f"record + commit, batch {batch}"]["median"])


def loop_us_each(results: dict[str, Any], running: int) -> float:
    return float(results[str(running)]["median"]) / running


def times_faster(rows: Sequence[dict[str, Any]], api_servers: int) -> float:
    """How many times faster a scrape is than the multiprocess mode's."""
    return find(rows, "multiprocess_ms", api_servers=api_servers) / find(rows, "ms", api_servers=api_servers)


def step_tokens_per_s(rows: Sequence[dict[str, Any]], quantization: str, batch: int) -> float:
    return find(rows, "tokens_per_s", quantization=quantization, step=f"decode {batch}")


def int8_gain(rows: Sequence[dict[str, Any]], batch: int) -> float:
    return step_tokens_per_s(rows, "int8", batch) / step_tokens_per_s(rows, "none", batch)


BENCHMARKS = (
    Benchmark(
        "statistics_cost",
        (),
        (
            # P7: microseconds an iteration, whatever the batch size.
            Bound("record + commit: batch 1 / batch 256", 0.83, 0.5, lambda r: record_us(r, 1) / record_us(r, 256)),
        ),
    ),
    Benchmark(
        "engine_loop",
        (),
        (
            # What a running request costs an iteration does not grow with how many there are.
            Bound("loop, each request: 256 / 1024", 0.92, 0.6, lambda r: loop_us_each(r, 256) / loop_us_each(r, 1024)),
            # What an iteration costs by itself is paid once for its whole batch.
            Bound("loop, each request: 1 / 256", 10.4, 3.0, lambda r: loop_us_each(r, 1) / loop_us_each(r, 256)),
        ),
    ),
    Benchmark(
        "scrape",
        ("--sizes", "1x1", "16x1", "64x8"),
        (
            # P7: adding up what every API server counted costs little, and nothing like reading all of their samples.
            Bound("scrape, 16 API servers: multiprocess mode / ours", 48.0, 20.0, lambda r: times_faster(r, 16)),
            Bound("scrape, 64 and 8 engines: multiprocess mode / ours", 609.0, 100.0, lambda r: times_faster(r, 64)),
            # P7: the same at any number of them.
            Bound(
                "scrape: 1 API server / 16",
                0.85,
                0.5,
                lambda r: find(r, "ms", api_servers=1) / find(r, "ms", api_servers=16),
            ),
        ),
    ),
    Benchmark(
        "log_stats",
        ("--starts", "3", "--rounds", "2"),
        (
            # P7: with statistics as fast as without, where next to nothing else costs time.
            Bound("tokens/s: with statistics / without", 1.0, 0.93, lambda r: float(r["ratio"])),
        ),
    ),
    Benchmark(
        "model_step",
        ("--decode", "1", "8", "32", "--prefill"),
        (
            # Reading the weights once serves the whole batch.
            Bound(
                "decode, tokens/s: batch 32 / batch 1",
                10.9,
                5.0,
                lambda r: step_tokens_per_s(r, "none", 32) / step_tokens_per_s(r, "none", 1),
            ),
            # A quarter of the bytes to read.
            Bound("decode, tokens/s: int8 / float32, batch 1", 2.8, 1.8, lambda r: int8_gain(r, 1), "avx512"),
            Bound("AVX2, decode, tokens/s: int8 / float32, batch 1", 2.6, 2.0, lambda r: int8_gain(r, 1), "avx2"),
            # AVX2 takes two multiplications for four int8 products and one for a float32's: at most twice as many.
            Bound("AVX2, decode, tokens/s: int8 / float32, batch 8", 1.9, 1.5, lambda r: int8_gain(r, 8), "avx2"),
            Bound("AVX2, decode, tokens/s: int8 / float32, batch 32", 1.4, 1.15, lambda r: int8_gain(r, 32), "avx2"),
        ),
    ),
)


def measure(benchmark: Benchmark, environment: dict[str, str]) -> Any:
    """Its results, in a process of its own; its tables are printed. Raises CalledProcessError."""
    command = [sys.executable, "-m", f"tests.benchmarks.{benchmark.name}", *benchmark.arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    tables, _, last_line = done.stdout.rstrip().rpartition("\n")
    print(tables, flush=True)
    return json.loads(last_line)["results"]


def judge(
    benchmark: Benchmark, measure: Callable[[Benchmark], Any], instruction_set: str = INSTRUCTION_SET
) -> Iterator[dict[str, Any]]:
    """A row for each bound that holds for this instruction set, with the better of two measurements where the first one
    broke any."""
    bounds = [bound for bound in benchmark.bounds if bound.instruction_set in (None, instruction_set)]
    results = [measure(benchmark)]
    if any(bound.ratio(results[0]) < bound.least for bound in bounds):
        results.append(measure(benchmark))
    for bound in bounds:
        ratio = max(bound.ratio(one) for one in results)
        holds = ratio >= bound.least
        yield {"what": bound.what, "ratio": ratio, "recorded": bound.recorded, "least": bound.least, "holds": holds}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--as-avx2", action="store_true", help="with AVX2 alone, whatever the processor has")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these benchmarks")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        environment = as_avx2(Path(cache)) if args.as_avx2 else dict(os.environ)
        rows = [
            row
            for benchmark in BENCHMARKS
            if not args.only or benchmark.name in args.only
            for row in judge(
                benchmark, partial(measure, environment=environment), "avx2" if args.as_avx2 else INSTRUCTION_SET
            )
        ]
    table(
        "Ratios",
        ("what", "now", "recorded", "at least", ""),
        [
            (
                row["what"],
                *(f"{row[name]:.2f}" for name in ("ratio", "recorded", "least")),
                "" if row["holds"] else "BROKEN",
            )
            for row in rows
        ],
    )
    document("bench_check", rows)
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
