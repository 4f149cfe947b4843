"""A scraper that trusts nothing: 20 times a second it scrapes a deployment and keeps what is wrong with the answers.

What it looks for: a counter or bucket that fell (P3), a series that stands twice in one answer (P2), an engine value
older than what the engine had broadcast one lease before the scrape began (P2: never stale data passed off as fresh),
and how long an engine's series were absent. The second witness is a subscription of its own to the engines' snapshots.
"""

from __future__ import annotations

import bisect
import threading
import time
import urllib.error
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from metrics import broadcast, deployment, snapshot
from metrics.layout import Layout, Shape, build_layout
from tests.e2e.harness import Samples, Served

ENDS = ("_total", "_bucket", "_count")
WITNESS = "vllm:generation_tokens_total"


@dataclass
class Findings:
    """All that was seen, whatever it was; a test asserts on it, the soak prints it."""

    scrapes: int = 0
    failed_scrapes: int = 0  # the API server that took the connection died; a scraper tries again, and so do we
    fell: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    absent: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))  # engine → spans

    def longest_absence_s(self, engine: str, since: float = 0.0) -> float:
        """The longest time, between two scrapes that had them, without an engine's series."""
        return max((end - start for start, end in self.absent[engine] if end >= since), default=0.0)


class Watch:
    """Scrapes from its making until `stop`, which returns the findings."""

    def __init__(self, served: Served, layout: Layout, *, num_engines: int, lease_s: float = 0.6) -> None:
        self.findings = Findings()
        self._served = served
        self._lease_s = lease_s
        self._witness_cell = layout.cell(WITNESS)
        self._num_engines = num_engines
        self._published: dict[int, tuple[list[float], list[float]]] = {e: ([], []) for e in range(num_engines)}
        self._highest: Samples = {}
        self._last_up: dict[str, float] = {}
        self._was_up: dict[str, bool] = {}
        self._ends = threading.Event()
        directory = next(served.runtime_directory.iterdir())
        self._threads = [
            threading.Thread(target=self._listen, args=(directory,), daemon=True),
            threading.Thread(target=self._scrape, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> Findings:
        self._ends.set()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()
        return self.findings

    def _listen(self, directory: Path) -> None:
        context = zmq.Context()
        endpoints = [broadcast.snapshot_endpoint(str(directory), engine) for engine in range(self._num_engines)]
        socket = broadcast.make_subscriber(context, endpoints, [broadcast.TOPIC_TALLY])
        while not self._ends.is_set():
            if socket.poll(50):
                _, payload = socket.recv_multipart()
                seen = snapshot.decode_snapshot(payload)
                times, values = self._published[seen.engine]
                value = memoryview(seen.cells).cast("d")[self._witness_cell]
                values.append(max(value, values[-1] if values else 0.0))
                times.append(time.monotonic())
        socket.close()
        context.term()

    def _scrape(self) -> None:
        while not self._ends.is_set():
            began = time.monotonic()
            try:
                samples = self._served.metrics()
            except AssertionError as error:
                self.findings.twice.append(str(error))
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                self.findings.failed_scrapes += 1
            else:
                self.findings.scrapes += 1
                self._judge(samples, began)
            self._ends.wait(max(0.0, began + 0.05 - time.monotonic()))

    def _judge(self, samples: Samples, began: float) -> None:
        for key, value in samples.items():
            if key[0].endswith(ENDS) and key[0].startswith(("vllm:", "wholebatch:")):
                if value < self._highest.get(key, 0.0):
                    self.findings.fell.append(f"{key}: {self._highest[key]} -> {value}")
                else:
                    self._highest[key] = value
        for engine in range(self._num_engines):
            self._judge_engine(samples, str(engine), began)

    def _judge_engine(self, samples: Samples, engine: str, began: float) -> None:
        value = next((v for (n, k), v in samples.items() if n == WITNESS and ("engine", engine) in k), None)
        now = time.monotonic()
        if value is None:
            self._was_up[engine] = False
            return
        if not self._was_up.get(engine, True):
            self.findings.absent[engine].append((self._last_up.get(engine, began), now))
        self._was_up[engine] = True
        self._last_up[engine] = now
        times, values = list(self._published[int(engine)][0]), self._published[int(engine)][1]
        known = bisect.bisect_right(times, began - self._lease_s) - 1
        if known >= 0 and value < values[known]:
            self.findings.stale.append(f"engine {engine}: {value} where {values[known]} was broadcast a lease before")


def engine_layout(num_engines: int, num_api_servers: int, max_model_len: int) -> Layout:
    """The layout of an engine's tally in a deployment without bucket overrides."""
    shape = Shape(num_engines=num_engines, num_api_servers=num_api_servers, max_model_len=max_model_len)
    return build_layout(deployment.ENGINE, shape)
