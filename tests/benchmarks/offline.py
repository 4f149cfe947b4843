"""Tokens/s without HTTP, on the workload of nano-vllm's published benchmark, scaled down for a CPU.

    python -m tests.benchmarks.offline [--sequences 16] [--lengths 0.25] [any flag of engine.serve]

256 sequences that are there at once; prompts of 100 to 1024 random token ids, 100 to 1024 tokens generated after each,
uniform, from seed 0; temperature 0.6, past end tokens. In full that is 133,966 output tokens. Here the first so many
sequences run, with both lengths multiplied. Scheduler, core, recorder and runner are the engine's; nothing is sent.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from engine.config import DeploymentConfig
from engine.flags import parse
from engine.loop.core import EngineCore
from engine.loop.process import load_runner, make_core
from engine.schedule.record import Recorder
from engine.wire import EngineConfig, Submit
from engine.wire.sampling import SamplingParams
from metrics.bulkhead import Bulkhead
from metrics.catalogue import ENGINE
from metrics.layout import Shape, build_layout
from metrics.tally import Tally
from tests.benchmarks.report import document, table

NUM_SEQUENCES = 256
SHORTEST, LONGEST = 100, 1024
LARGEST_TOKEN_ID = 10_000
TEMPERATURE = 0.6


@dataclass(frozen=True, slots=True)
class Ask:
    """One sequence that the workload asks for."""

    prompt: list[int]
    max_tokens: int


def workload(num_sequences: int = NUM_SEQUENCES, lengths: float = 1.0) -> list[Ask]:
    """The first of the 256 sequences; each length, rounded, is a multiple of what it is in full, and at least 1."""
    source = random.Random(0)
    prompts = []
    for _ in range(NUM_SEQUENCES):
        length = source.randint(SHORTEST, LONGEST)
        prompts.append([source.randint(0, LARGEST_TOKEN_ID) for _ in range(length)])
    outputs = [source.randint(SHORTEST, LONGEST) for _ in range(NUM_SEQUENCES)]
    scaled = [
        Ask(prompt[: max(1, round(len(prompt) * lengths))], max(1, round(output * lengths)))
        for prompt, output in zip(prompts, outputs, strict=True)
    ]
    return scaled[:num_sequences]


def engine_config(deployment: DeploymentConfig) -> EngineConfig:
    """What a deployment of one engine would tell it."""
    return EngineConfig(
        index=0,
        incarnation=1,
        num_engines=1,
        num_api_servers=1,
        directory="/nowhere",
        lifeline_fd=0,
        model=deployment.model,
        cache=deployment.cache,
        scheduler=deployment.scheduler,
        stats=deployment.stats,
        patience=deployment.patience,
        facts=None,
    )


def generate(core: EngineCore, asked: Sequence[Ask], first_id: int = 0) -> tuple[int, int]:
    """(tokens, iterations) until all have ended."""
    for number, ask in enumerate(asked, first_id):
        sampling = SamplingParams(max_tokens=ask.max_tokens, temperature=TEMPERATURE, ignore_eos=True)
        core.submit((0, 1), Submit(number, 1, ask.prompt, sampling), time.monotonic())
    num_tokens = num_iterations = 0
    while core.has_work:
        num_tokens += sum(len(o.token_ids) for outputs in core.step().values() for o in outputs.outputs)
        num_iterations += 1
    return num_tokens, num_iterations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=16, help="of the 256 (16)")
    parser.add_argument("--lengths", type=float, default=0.25, help="of prompts and outputs, a fraction (0.25)")
    args, flags = parser.parse_known_args()
    config = engine_config(parse(flags, dict(os.environ)))
    runner = load_runner(config, lambda line: None)
    layout = build_layout(ENGINE, Shape(num_engines=1, num_api_servers=1, max_model_len=runner.max_model_len))
    recorder = Recorder(Tally(layout), layout, 1)
    core = make_core(config, runner, recorder, Bulkhead(recorder.faulted, logging.getLogger(__name__)))
    asked = workload(args.sequences, args.lengths)
    generate(core, [Ask([1, 2, 3], 16)], first_id=NUM_SEQUENCES)  # a warm-up
    began = time.perf_counter()
    num_tokens, num_iterations = generate(core, asked)
    elapsed = time.perf_counter() - began
    expected = sum(ask.max_tokens for ask in asked)
    assert num_tokens == expected, f"{num_tokens} tokens instead of {expected}"
    result = {
        "sequences": len(asked),
        "lengths": args.lengths,
        "flags": flags,
        "prompt_tokens": sum(len(ask.prompt) for ask in asked),
        "output_tokens": num_tokens,
        "iterations": num_iterations,
        "seconds": elapsed,
        "tokens_per_s": num_tokens / elapsed,
    }
    header = ("sequences", "prompt tokens", "output tokens", "iterations", "seconds", "output tokens/s")
    table(
        f"Offline, lengths x {args.lengths:g}",
        header,
        [
            (
                len(asked),
                result["prompt_tokens"],
                num_tokens,
                num_iterations,
                f"{elapsed:.1f}",
                f"{num_tokens / elapsed:.1f}",
            )
        ],
    )
    document("offline", result)


if __name__ == "__main__":
    main()
