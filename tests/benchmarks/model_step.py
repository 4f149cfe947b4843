"""Milliseconds of one step of the model through `TorchRunner`, decoding batches and prefills, and where they go.

    python -m tests.benchmarks.model_step [--model PATH] [--quantization none int8] [--decode 1 8 32 128]
        [--prefill 167 512 2048] [--repeats 9]

On a CPU. Decoding sequences have a context of about 200 tokens. The shares are a profiler's, of a run of its own:
`linear` the products with weights, `attention` everything from reading the cache on, `rest` what is between them.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from typing import Literal

import torch

import engine.device.kernels.linear
from engine import default_model
from engine.config import CacheConfig, ModelConfig, SchedulerConfig
from engine.device.kernels.compiled import INSTRUCTION_SET
from engine.device.runner import TorchRunner
from engine.schedule.batch import Batch, ScheduledSequence
from engine.wire.sampling import SamplingParams
from tests.benchmarks.report import document, table

CONTEXT = 200
MAX_MODEL_LEN = 2112
GREEDY = SamplingParams(max_tokens=1, temperature=0.0)


def load(path: str, quantization: Literal["int8"] | None, num_sequences: int) -> TorchRunner:
    num_blocks = max(num_sequences * -(-(CONTEXT + 8) // 16), MAX_MODEL_LEN // 16) + 1
    return TorchRunner.load(
        ModelConfig(path=path, quantization=quantization, max_model_len=MAX_MODEL_LEN),
        CacheConfig(num_gpu_blocks_override=num_blocks),
        SchedulerConfig(),
    )


def sequence(number: int, start: int, num_tokens: int) -> ScheduledSequence:
    """Make a sequence of arbitrary tokens, in blocks of its own."""
    length = start + num_tokens
    first = number * -(-(CONTEXT + 8) // 16)
    return ScheduledSequence(
        sequence_id=number,
        token_ids=[(7 * i + 13 * number) % 40_000 + 300 for i in range(length)],
        num_prompt_tokens=length,
        start=start,
        num_tokens=num_tokens,
        block_table=list(range(first, first + -(-length // 16))),
        sampling=GREEDY,
    )


def decodes(count: int) -> Batch:
    return Batch([sequence(number, CONTEXT - 1 + number % 8, 1) for number in range(count)])


def step_ms(runner: TorchRunner, batch: Batch) -> float:
    began = time.perf_counter()
    runner.run(batch)
    return (time.perf_counter() - began) * 1e3


def shares(runner: TorchRunner, batch: Batch) -> dict[str, float]:
    """Which shares of one step's time each kind of operation takes."""
    profiler = cProfile.Profile()
    profiler.runcall(runner.run, batch)
    calls = pstats.Stats(profiler)
    spent = dict.fromkeys(("linear", "attention"), 0.0)
    for (file, _, function), (_, _, _, cumulative_s, _) in calls.stats.items():  # type: ignore[attr-defined]
        if file == engine.device.kernels.linear.__file__ and function == "__call__":
            spent["linear"] += cumulative_s
        elif function == "attention":
            spent["attention"] += cumulative_s
    total_s = calls.total_tt  # type: ignore[attr-defined]
    return {kind: s / total_s for kind, s in spent.items()} | {"rest": 1 - sum(spent.values()) / total_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="(the default model)")
    parser.add_argument("--quantization", nargs="+", choices=("none", "int8"), default=["none", "int8"])
    parser.add_argument("--decode", nargs="*", type=int, default=[1, 8, 32, 128], help="sequences (1 8 32 128)")
    parser.add_argument("--prefill", nargs="*", type=int, default=[167, 512, 2048], help="tokens (167 512 2048)")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    path = args.model or str(default_model.fetch())
    batches = {f"decode {n}": (n, decodes(n)) for n in args.decode}
    batches |= {f"prefill {n}": (n, Batch([sequence(0, 0, n)])) for n in args.prefill}
    runners = {name: load(path, None if name == "none" else name, max(args.decode)) for name in args.quantization}
    results, rows = [], []
    for what, (num_tokens, batch) in batches.items():
        times: dict[str, list[float]] = {name: [] for name in runners}
        for repeat in range(args.repeats + 1):
            for name, runner in runners.items():
                elapsed_ms = step_ms(runner, batch)
                if repeat:
                    times[name].append(elapsed_ms)
        for name, runner in runners.items():
            median_ms = statistics.median(times[name])
            row = {"quantization": name, "step": what, "median_ms": median_ms, "least_ms": min(times[name])}
            row |= {"tokens_per_s": 1e3 * num_tokens / median_ms, "shares": shares(runner, batch)}
            results.append(row)
            cells = (f"{median_ms:.1f}", f"{min(times[name]):.1f}", f"{row['tokens_per_s']:.0f}")
            rows.append((what, name, *cells, *(f"{100 * share:.0f} %" for share in row["shares"].values())))
    header = ("step", "quantization", "median, ms", "least, ms", "tokens/s", "linear", "attention", "rest")
    table(f"One step, {torch.get_num_threads()} threads, {INSTRUCTION_SET}", header, rows)
    document("model_step", results)


if __name__ == "__main__":
    main()
