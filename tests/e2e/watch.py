"""A scraper that trusts nothing: 20 times a second it scrapes a deployment and keeps what is wrong with the answers.

What it looks for: a counter or bucket that fell (P3), a series that stands twice in one answer (P2), an engine value
older than what the engine had broadcast one lease before the scrape began (P2: never stale data passed off as fresh),
and when an engine's series were absent. The second witness is a subscription of its own to the engines' snapshots.
"""

from __future__ import annotations

import bisect
import http.client
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import zmq

from metrics import broadcast, snapshot
from metrics.catalogue import ENGINE
from metrics.layout import Layout, Shape, build_layout
from tests.e2e.harness import Served

ENDS = ("_total", "_bucket", "_count")
WITNESS = "vllm:generation_tokens_total"
SCRAPE_S = 0.05
SCRAPE_TIMEOUT_S = 0.5  # an API server that was frozen with the scrape in its hands


Series = dict[str, float]  # a sample's name and labels as they are written → its value


class TwiceError(Exception):
    """One answer has a series twice."""


class Look(NamedTuple):
    """Whether one scrape had an engine's series."""

    began: float
    ended: float
    is_there: bool


@dataclass
class Findings:
    """All that was seen, whatever it was; a test asserts on it, the soak prints it."""

    scrapes: int = 0
    failed: list[str] = field(default_factory=list)  # the API server that took the connection died or froze
    fell: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    looks: dict[str, list[Look]] = field(default_factory=lambda: defaultdict(list))  # engine → looks

    def longest_absence_s(self, engine: str, since: float = 0.0) -> float:
        """The longest time from the end of one scrape with the engine's series to the end of the next one with them,
        where one without was between the two."""
        longest, last, is_gap = 0.0, None, False
        for look in self.looks[engine]:
            if look.began < since:
                last = look.ended if look.is_there else last
            elif look.is_there:
                longest = max(longest, look.ended - last) if is_gap and last is not None else longest
                last, is_gap = look.ended, False
            else:
                is_gap = True
        return longest

    def gone_after_s(self, engine: str, since: float) -> float | None:
        """From an instant to the begin of the last scrape that still had the series, before the first without."""
        last = since
        for look in self.looks[engine]:
            if look.began < since:
                continue
            if not look.is_there:
                return last - since
            last = look.began
        return None

    def back_after_s(self, engine: str, since: float) -> float | None:
        """From an instant to the end of the first scrape with the series after one without; 0 if all had them, None
        if they did not come back."""
        is_gap = False
        for look in self.looks[engine]:
            if look.began < since:
                continue
            if is_gap and look.is_there:
                return look.ended - since
            is_gap = is_gap or not look.is_there
        return None if is_gap else 0.0


class Watch:
    """Scrapes from its making until `stop`, which returns the findings."""

    def __init__(self, served: Served, layout: Layout, *, num_engines: int, lease_s: float = 0.6) -> None:
        self.findings = Findings()
        self._served = served
        self._lease_s = lease_s
        self._witness_cell = layout.cell(WITNESS)
        self._num_engines = num_engines
        self._published: dict[int, tuple[list[float], list[float]]] = {e: ([], []) for e in range(num_engines)}
        self._highest: Series = {}
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
                series = read(self._served.get("/metrics", SCRAPE_TIMEOUT_S))
            except TwiceError as error:
                self.findings.twice.append(str(error))
            except (OSError, http.client.HTTPException) as error:
                self.findings.failed.append(str(error))
            else:
                self.findings.scrapes += 1
                self._judge(series, began)
            self._ends.wait(max(0.0, began + SCRAPE_S - time.monotonic()))

    def _judge(self, series: Series, began: float) -> None:
        for key, value in series.items():
            name = key.partition("{")[0]
            if name.endswith(ENDS) and name.startswith(("vllm:", "wholebatch:")):
                if value < self._highest.get(key, 0.0):
                    self.findings.fell.append(f"{key}: {self._highest[key]} -> {value}")
                else:
                    self._highest[key] = value
        for engine in range(self._num_engines):
            self._judge_engine(series, str(engine), began)

    def _judge_engine(self, series: Series, engine: str, began: float) -> None:
        label = f'engine="{engine}"'
        value = next((v for key, v in series.items() if key.startswith(WITNESS) and label in key), None)
        self.findings.looks[engine].append(Look(began, time.monotonic(), value is not None))
        if value is None:
            return
        times, values = list(self._published[int(engine)][0]), self._published[int(engine)][1]
        known = bisect.bisect_right(times, began - self._lease_s) - 1
        if known >= 0 and value < values[known]:
            self.findings.stale.append(f"engine {engine}: {value} where {values[known]} was broadcast a lease before")


def read(text: str) -> Series:
    """The samples of a text exposition, read simply: 20 scrapes a second of thousands of lines. Raises TwiceError."""
    series: Series = {}
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        key, _, value = line.rpartition(" ")
        if key in series:
            raise TwiceError(f"series twice: {key}")
        series[key] = float(value)
    return series


@contextmanager
def watched(served: Served, *, num_engines: int, num_api_servers: int, max_model_len: int = 2048) -> Iterator[Findings]:
    """Findings of the time inside; complete on leaving."""
    watch = Watch(served, engine_layout(num_engines, num_api_servers, max_model_len), num_engines=num_engines)
    try:
        yield watch.findings
    finally:
        watch.stop()


def engine_layout(num_engines: int, num_api_servers: int, max_model_len: int) -> Layout:
    """The layout of an engine's tally in a deployment without bucket overrides."""
    shape = Shape(num_engines=num_engines, num_api_servers=num_api_servers, max_model_len=max_model_len)
    return build_layout(ENGINE, shape)
