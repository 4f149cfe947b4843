"""What the statistics cost the engine: record + commit in each iteration of the loop, and a publication in the beacon.

The real scheduler and core run decode iterations with a runner that returns at once. What they ask of the recorder in
one iteration is asked again, and timed, with a commit to a file in shared memory.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import zmq

from engine.config import SchedulerConfig
from engine.loop.core import EngineCore
from engine.schedule.batch import Batch, SampledToken
from engine.schedule.block_pool import BlockPool
from engine.schedule.record import Recorder
from engine.schedule.scheduler import Scheduler
from engine.wire import SamplingParams, Submit
from metrics.broadcast import TOPIC_TALLY, Publisher, snapshot_endpoint
from metrics.bulkhead import Bulkhead
from metrics.catalogue import ENGINE
from metrics.files.store import TallyStore, tally_path
from metrics.layout import Shape, build_layout
from metrics.snapshot import Grant, Snapshot, encode
from tests.benchmarks.report import document, spread, table

NUM_API_SERVERS = 4
NUM_ITERATIONS = 2000


class InstantRunner:
    """Returns token 1 for every sequence, at once."""

    def run(self, batch: Batch) -> list[SampledToken]:
        return [SampledToken(1, None)] * sum(part.samples for part in batch.sequences)

    def release(self, sequence_ids: Sequence[int]) -> None:
        pass


class CapturingRecorder(Recorder):
    """Records, and keeps what it was asked to: so that the same calls can be timed again, alone."""

    __slots__ = ("calls",)
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]]

    def __getattribute__(self, name: str) -> Any:
        method = super().__getattribute__(name)
        if name.startswith("_") or name == "calls":
            return method

        def captured(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            return method(*args, **kwargs)

        return captured


def record_and_commit_us(batch_size: int, directory: str) -> list[float]:
    """Microseconds of each of many decode iterations."""
    layout = build_layout(ENGINE, Shape(num_engines=1, num_api_servers=NUM_API_SERVERS, max_model_len=8192))
    store = TallyStore.open(tally_path(directory, ENGINE, batch_size), layout, incarnation=1, now_unix=time.time())
    recorder = CapturingRecorder(store.tally, layout, NUM_API_SERVERS)
    recorder.calls = []
    timed = Recorder(store.tally, layout, NUM_API_SERVERS)
    pool = BlockPool(num_blocks=batch_size * (NUM_ITERATIONS // 16 + 8), block_size=16, enable_prefix_caching=True)
    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs=batch_size),
        pool,
        max_model_len=8192,
        eos_token_ids=frozenset(),
        vocab_size=100,
    )
    bulkhead = Bulkhead(recorder.faulted, logging.getLogger(__name__))
    core = EngineCore(scheduler, InstantRunner(), recorder, time.perf_counter, bulkhead)
    sampling = SamplingParams(max_tokens=NUM_ITERATIONS + 100, temperature=0.0)
    for number in range(batch_size):
        core.submit((number % NUM_API_SERVERS, 1), Submit(number, 1, [2, 3, 4], sampling), time.perf_counter())
    costs = []
    for _ in range(NUM_ITERATIONS):
        recorder.calls = []
        core.step()
        again = [(getattr(timed, name), args, kwargs) for name, args, kwargs in recorder.calls]
        began = time.perf_counter()
        for method, args, kwargs in again:
            method(*args, **kwargs)
        store.commit()
        costs.append((time.perf_counter() - began) * 1e6)
    store.close()
    return costs[50:]


def publication_us(directory: str) -> list[float]:
    """Microseconds to put one snapshot together, encode it and hand it to the socket, with a subscriber."""
    layout = build_layout(ENGINE, Shape(num_engines=1, num_api_servers=NUM_API_SERVERS, max_model_len=8192))
    cells = bytes(8 * layout.num_cells)
    context = zmq.Context()
    publisher = Publisher(context, snapshot_endpoint(directory, 0))
    subscriber = context.socket(zmq.SUB)
    subscriber.setsockopt(zmq.RCVHWM, 10)
    subscriber.subscribe(TOPIC_TALLY)
    subscriber.connect(snapshot_endpoint(directory, 0))
    while not publisher.has_subscribers(TOPIC_TALLY):
        time.sleep(0.01)

    def publish(sequence: int) -> None:
        snapshot = Snapshot(
            layout_digest=layout.digest,
            engine=0,
            incarnation=1,
            sequence=sequence,
            created_unix=1.0,
            published_unix=time.time(),
            grant=Grant(term=(1, 1), api_server=0, incarnation=1),
            echo=7,
            is_stuck=False,
            cells=cells,
        )
        publisher.publish(TOPIC_TALLY, encode(snapshot))

    costs = each_us(publish, NUM_ITERATIONS)
    subscriber.close(0)
    publisher.close()
    context.term()
    return costs


def each_us(action: Callable[[int], object], times: int) -> list[float]:
    costs = []
    for number in range(times):
        began = time.perf_counter()
        action(number)
        costs.append((time.perf_counter() - began) * 1e6)
    return costs[50:]


def main() -> None:
    rows, results = [], {}
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as directory:
        measured = {f"record + commit, batch {size}": record_and_commit_us(size, directory) for size in (1, 256)}
        measured["publication in the beacon"] = publication_us(directory)
    for name, costs in measured.items():
        results[name] = spread(costs)
        rows.append((name, f"{results[name]['median']:.1f}", f"{results[name]['p99']:.1f}"))
    table("Microseconds each", ("", "median", "p99"), rows)
    document("statistics_cost", results)


if __name__ == "__main__":
    main()
