"""What one iteration costs the host beside the model: scheduling, booking, recording, making and encoding the outputs.

The real core runs decode iterations with a runner that returns at once. Garbage collection is on, as in an engine.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from engine import wire
from engine.config import SchedulerConfig
from engine.loop.core import EngineCore
from engine.schedule.batch import Batch, SampledToken
from engine.schedule.block_pool import BlockPool
from engine.schedule.record import Recorder
from engine.schedule.scheduler import Scheduler
from engine.wire import SamplingParams, Submit
from metrics.bulkhead import Bulkhead
from metrics.catalogue import ENGINE
from metrics.layout import Shape, build_layout
from metrics.tally import Tally
from tests.benchmarks.report import document, spread, table

NUM_API_SERVERS = 4
BATCH_SIZES = (1, 64, 256, 512, 1024)
NUM_ITERATIONS = 400
SAMPLED = SampledToken(1, None)


class InstantRunner:
    """Returns token 1 for every sequence, at once."""

    def run(self, batch: Batch) -> list[SampledToken]:
        return [SAMPLED for part in batch.sequences if part.samples]

    def release(self, sequence_ids: Sequence[int]) -> None:
        pass


def iterations_us(batch_size: int) -> list[float]:
    """Microseconds of each of many iterations in which everybody decodes."""
    layout = build_layout(ENGINE, Shape(num_engines=1, num_api_servers=NUM_API_SERVERS, max_model_len=8192))
    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs=batch_size, max_num_batched_tokens=4 * batch_size),
        BlockPool(num_blocks=batch_size * (NUM_ITERATIONS // 16 + 4), block_size=16, enable_prefix_caching=True),
        max_model_len=8192,
        eos_token_ids=frozenset({2}),
        vocab_size=100_000,
    )
    recorder = Recorder(Tally(layout), layout, NUM_API_SERVERS)
    bulkhead = Bulkhead(recorder.faulted, logging.getLogger(__name__))
    core = EngineCore(scheduler, InstantRunner(), recorder, time.perf_counter, bulkhead)
    sampling = SamplingParams(max_tokens=NUM_ITERATIONS + 100)
    for number in range(batch_size):
        submit = Submit(number, 1, [number, 3, 4, 5][: 1 + number % 4], sampling)
        core.submit((number % NUM_API_SERVERS, 1), submit, time.perf_counter())
    core.step()
    costs = []
    for _ in range(NUM_ITERATIONS):
        began = time.perf_counter()
        for message in core.step().values():
            wire.encode(message)
        costs.append((time.perf_counter() - began) * 1e6)
    return costs[20:]


def main() -> None:
    results = {size: spread(iterations_us(size)) for size in BATCH_SIZES}
    rows = [
        (size, f"{cost['median']:.0f}", f"{cost['p99']:.0f}", f"{cost['median'] / size:.2f}")
        for size, cost in results.items()
    ]
    table("Microseconds an iteration", ("decodes", "median", "p99", "median each"), rows)
    document("engine_loop", results)


if __name__ == "__main__":
    main()
