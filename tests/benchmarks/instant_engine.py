"""An engine process without a model: it makes tokens at once, or one a sequence every so many milliseconds.

Run in place of `engine.loop.process` (see `serve_instant`). Everything but the runner is the real engine.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Final

from engine.loop import process
from engine.schedule.batch import Batch, SampledToken
from engine.wire import EngineConfig

INTERVAL_VARIABLE: Final = "INSTANT_ENGINE_INTERVAL_MS"  # from the benchmark, past the supervisor's flags
FIRST_TOKEN: Final = 300  # of the default model's vocabulary: before it are special and half characters


class InstantRunner:
    """Tokens that differ from step to step and from sequence to sequence, and cost nothing to compute."""

    num_blocks = 40_000
    block_size = 16
    max_model_len = 8_192
    vocab_size = 49_152
    eos_token_ids: frozenset[int] = frozenset({2})
    cache_dtype = "float32"
    suited_budget = 2048
    suited_iteration_s: float | None = None

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._due_at = 0.0

    def run(self, batch: Batch) -> list[SampledToken]:
        time.sleep(max(0.0, self._due_at - time.monotonic()))
        self._due_at = max(time.monotonic(), self._due_at + self._interval_s)
        return [
            SampledToken(FIRST_TOKEN + (part.sequence_id * 7919 + part.start) % 40_000, None)
            for part in batch.sequences
            if part.samples
        ]

    def release(self, sequence_ids: Sequence[int]) -> None:
        pass


def make_runner(config: EngineConfig, progress: Callable[[str], None]) -> InstantRunner:
    return InstantRunner(float(os.environ.get(INTERVAL_VARIABLE, "0")) / 1000)


if __name__ == "__main__":
    sys.exit(process.main(runner_factory=make_runner))
