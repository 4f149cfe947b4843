"""The default model's greedy output against transformers': 20 prompts of 5 to 900 tokens, in every way of running them.

    python -m tests.benchmarks.greedy_equality [MODEL.gguf] [--num-tokens 32] [--num-prompts 20]

Prints a table, each tie and each fault, and last a JSON document; exit code 1 on a fault. Takes minutes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from engine import default_model
from engine.config import SchedulerConfig
from tests.benchmarks import report
from tests.greedy import Comparison, Engine, Expected, Reference, export_gguf, greedily, load_runner
from tests.tiny_models import CORPUS

MAX_MODEL_LEN = 1024
NUM_BLOCKS = 2400
NUM_FEW_BLOCKS = 120  # of 16 tokens: several long prompts at a time do not fit with what they generate
BATCH = 32

Prompts = list[list[int]]


def make_prompts(path: Path, count: int) -> Prompts:
    """Make English prompts, each beginning elsewhere, of lengths spread from 5 to 900 tokens."""
    from frontend.text.tokenizer import load_tokenizer

    words = load_tokenizer(str(path)).encode(" ".join(CORPUS * 60), add_special_tokens=False)
    lengths = [5 + round((900 - 5) * (i / max(1, count - 1)) ** 2) for i in range(count)]
    return [words[7 * i : 7 * i + length] for i, length in enumerate(lengths)]


def ways(path: Path, num_tokens: int) -> dict[str, Callable[[Prompts], list[list[int]]]]:
    """How the same prompts can be run; each gives the continuations in the prompts' order."""
    runner = load_runner(path, num_blocks=NUM_BLOCKS, max_model_len=MAX_MODEL_LEN)
    sampling = greedily(num_tokens)
    warm = Engine(runner, caches=True)

    def alone(prompts: Prompts) -> list[list[int]]:
        engine = Engine(runner)
        return [engine.generate([prompt], sampling)[0] for prompt in prompts]

    def batched(prompts: Prompts) -> list[list[int]]:
        filled = (prompts * BATCH)[:BATCH]
        return Engine(runner).generate(filled, sampling)[: len(prompts)]

    def chunked(size: int) -> Callable[[Prompts], list[list[int]]]:
        config = SchedulerConfig(long_prefill_token_threshold=size)
        return lambda prompts: Engine(runner, config).generate(prompts, sampling)

    def preempting(prompts: Prompts) -> list[list[int]]:
        engine = Engine(runner, num_blocks=NUM_FEW_BLOCKS)
        tokens = engine.generate(prompts, sampling)
        assert engine.num_preemptions > 0, "nothing was preempted: this shows nothing"
        return tokens

    return {
        "alone": alone,
        f"in a batch of {BATCH}": batched,
        "chunks of 16": chunked(16),
        "chunks of 64": chunked(64),
        "chunks of 512": chunked(512),
        "prefix cache, cold": lambda prompts: warm.generate(prompts, sampling),
        "prefix cache, warm": lambda prompts: warm.generate(prompts, sampling),
        f"preemption, {NUM_FEW_BLOCKS} blocks": preempting,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="default: the default model")
    parser.add_argument("--num-tokens", type=int, default=32)
    parser.add_argument("--num-prompts", type=int, default=20)
    args = parser.parse_args()
    model = args.model or default_model.fetch()
    prompts = make_prompts(model, args.num_prompts)
    with tempfile.TemporaryDirectory() as directory:
        reference = Reference(export_gguf(model, Path(directory)))
        expected: list[Expected] = [reference.continue_greedily(prompt, args.num_tokens) for prompt in prompts]
    del reference
    results = {}
    for name, way in ways(model, args.num_tokens).items():
        comparison = Comparison()
        for prompt, want, got in zip(prompts, expected, way(prompts), strict=True):
            comparison.add(f"{name}, prompt of {len(prompt)}", want, got)
        results[name] = comparison
        print(f"{name}: {comparison.num_equal} of {len(prompts)} equal", file=sys.stderr, flush=True)
    for comparison in results.values():
        for line in (*(f"tie: {t}" for t in comparison.ties), *(f"FAULT: {f}" for f in comparison.faults)):
            print(line)
    report.table(
        f"Greedy output against transformers: {len(prompts)} prompts, {args.num_tokens} tokens each",
        ("how", "equal", "ties", "faults"),
        [(name, c.num_equal, len(c.ties), len(c.faults)) for name, c in results.items()],
    )
    rows = {name: {"equal": c.num_equal, "ties": c.ties, "faults": c.faults} for name, c in results.items()}
    report.document("greedy_equality", {"num_prompts": len(prompts), "num_tokens": args.num_tokens, "ways": rows})
    return 1 if any(c.faults for c in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
