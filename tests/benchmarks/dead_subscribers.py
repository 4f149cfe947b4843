"""What 64 subscribers that never read cost the engine: its iteration rate without them, with subscribers of its tally,
and with subscribers of the record of every iteration as well, which is made only where somebody asks for it.

They are measured in turns, so that a machine that slows down slows all of them down.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import zmq

from metrics import broadcast
from tests.benchmarks.report import document, table
from tests.e2e.harness import Served, served, total, wait_for
from tests.e2e.load import asks, steady_load
from tests.tiny_models import write_tiny_llama

NUM_SUBSCRIBERS = 64
ROUNDS = 6
ROUND_S = 6.0
NOBODY = "nobody"
TOPICS = {
    NOBODY: (),
    "of the tally": (broadcast.TOPIC_TALLY,),
    "of everything": (broadcast.TOPIC_TALLY, broadcast.TOPIC_ITERATIONS),
}


@contextmanager
def dead_subscribers(deployment: Served, topics: Sequence[bytes]) -> Iterator[None]:
    """Connected inside, with full queues: they read nothing. None, where there are no topics."""
    with ExitStack() as stack:
        context = stack.enter_context(zmq.Context())
        endpoint = broadcast.snapshot_endpoint(str(next(deployment.runtime_directory.iterdir())), 0)
        before = total(deployment.metrics(), "wholebatch:snapshots_total")
        for _ in range(NUM_SUBSCRIBERS if topics else 0):
            socket = stack.enter_context(context.socket(zmq.SUB))
            socket.set(zmq.RCVHWM, 1)
            socket.set(zmq.LINGER, 0)
            for topic in topics:
                socket.subscribe(topic)
            socket.connect(endpoint)
        if topics:
            full = before + 2 * broadcast.SUBSCRIBER_HWM
            wait_for(lambda: total(deployment.metrics(), "wholebatch:snapshots_total") > full, "full queues")
        yield


def rate(deployment: Served) -> float:
    """Iterations a second, for one round."""

    def look() -> tuple[float, float]:
        return total(deployment.metrics("/metrics/engine/0"), "wholebatch:iterations_total"), time.monotonic()

    first, began = look()
    time.sleep(ROUND_S)
    last, ended = look()
    return (last - first) / (ended - began)


def main() -> None:
    rates: dict[str, list[float]] = {name: [] for name in TOPICS}
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "tiny-llama"
        write_tiny_llama(model)
        requests = asks(64, prompt_tokens=(20, 60), max_tokens=128, vocab=250)
        with served(model, "--api-server-count", "2") as deployment, steady_load(deployment, requests, 8):
            for _ in range(ROUNDS):
                for name, topics in TOPICS.items():
                    with dead_subscribers(deployment, topics):
                        rates[name].append(rate(deployment))
            dropped = total(deployment.metrics(), "wholebatch:snapshots_total", {"result": "dropped"})
    medians = {name: statistics.median(found) for name, found in rates.items()}
    rows = []
    for name, found in rates.items():
        ratio = medians[name] / medians[NOBODY]
        rows.append((name, f"{medians[name]:.0f}", f"{min(found):.0f}", f"{max(found):.0f}", f"{ratio:.3f}"))
    header = (f"{NUM_SUBSCRIBERS} subscribers that never read", "median", "least", "greatest", "ratio")
    table("Iterations a second", header, rows)
    print(f"\nsnapshots dropped for everybody: {dropped:g}")
    document("dead_subscribers", {"rates": rates, "medians": medians, "dropped": dropped})


if __name__ == "__main__":
    main()
