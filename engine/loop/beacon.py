"""The engine's second thread: it broadcasts what the loop has committed, whatever the loop is doing.

It owns the publisher, the heartbeat socket and the `Granter`, follows the deployment table, and tells the supervisor
that the engine lives. The loop and the beacon share one `Shared`: plain attributes with one writer each, and queues.

It reads `store.committed` and never touches the store. What it counts itself (`snapshots_total`, faults) goes into
cells that only it writes; the loop's next commit makes them durable, and only committed values are published (P3).
"""

from __future__ import annotations

import collections
import logging
import os
import queue
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import msgpack
import zmq

from engine.wire import (
    DEPLOYMENT_TOPIC,
    Alive,
    Deployment,
    EngineConfig,
    Lifeline,
    WireError,
    decode_deployment,
    deployment_endpoint,
)
from metrics import broadcast
from metrics.bulkhead import Bulkhead
from metrics.catalogue import API_SERVER
from metrics.election import Granter
from metrics.files import TallyStore
from metrics.layout import Layout
from metrics.snapshot import CELL_BYTES, Grant, Heartbeat, Snapshot, SnapshotError, decode_to_beacon, encode

log = logging.getLogger("engine.loop.beacon")

ALIVE_S: Final = 0.5
MAX_ITERATIONS: Final = 4096  # records kept for the live topic between two publications; older ones are dropped


@dataclass(slots=True)
class Shared:
    """What the loop and the beacon tell each other."""

    progress: int = 0  # the loop's turns; only it writes
    is_busy: bool = False  # the loop has work; only it writes
    wants_iterations: bool = False  # somebody watches iterations live; only the beacon writes
    iterations: collections.deque[dict[str, Any]] = field(
        default_factory=lambda: collections.deque(maxlen=MAX_ITERATIONS)
    )  # loop to beacon
    ended: queue.SimpleQueue[tuple[int, int]] = field(default_factory=queue.SimpleQueue)  # API servers; beacon to loop


class Beacon:
    """`start` runs it in a thread; `turn` is one round, for tests."""

    def __init__(
        self,
        config: EngineConfig,
        layout: Layout,
        store: TallyStore,
        shared: Shared,
        lifeline: Lifeline,
        *,
        clock: Callable[[], float] = time.monotonic,
        on_orphaned: Callable[[], None] = lambda: os._exit(1),
    ) -> None:
        self._config = config
        self._layout = layout
        self._store = store
        self._shared = shared
        self._lifeline = lifeline
        self._stall_timeout_s = config.patience.stall_timeout_s
        self._clock = clock
        self._on_orphaned = on_orphaned
        self._cells = _Cells(layout)
        self._granter = Granter(config.incarnation, config.stats.lease_s, clock())
        self._table: Deployment | None = None
        self._known: dict[int, int] = {}  # API server index -> newest incarnation that has not ended
        self._sequence = 0
        self._published = -1  # commit sequence of the last snapshot
        self._publish_at = 0.0
        self._refresh_at = 0.0
        self._alive_at = 0.0
        self._progress = (-1, 0.0)  # the loop's, and since when
        self._bulkhead = Bulkhead(self._count_fault, log)
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Make the sockets, which belong to the thread from then on, and start it. Raises BroadcastError."""
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            self._open(context)
        except broadcast.BroadcastError:
            context.destroy(linger=0)
            raise
        self._thread = threading.Thread(target=self._run, args=(context,), name="beacon", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Publish once more and end; what was committed before the call is in that last snapshot."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        try:
            while not self._stopping.is_set():
                self.turn()
            with self._bulkhead.around("publish"):
                self._publish()
        finally:
            context.destroy(linger=100)  # ms: the last snapshot's way out

    def _open(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        directory, index = self._config.directory, self._config.index
        self._publisher = broadcast.Publisher(context, broadcast.snapshot_endpoint(directory, index))
        self._heartbeats = broadcast.bind_heartbeats(context, broadcast.heartbeat_endpoint(directory, index))
        self._tables = broadcast.make_subscriber(context, [deployment_endpoint(directory)], [DEPLOYMENT_TOPIC])
        self._poller = zmq.Poller()
        for socket in (self._heartbeats, self._tables, self._lifeline.fileno()):
            self._poller.register(socket, zmq.POLLIN)

    # --- one round ---

    def turn(self) -> None:
        """Wait for what comes first, a message or the next publication, and deal with it."""
        now = self._clock()
        # A commit wakes nobody up: look for one at least every publish interval.
        due = min(max(self._publish_at, now + self._config.stats.publish_interval_s), self._refresh_at, self._alive_at)
        if self._has_news():
            due = min(due, self._publish_at)
        events = dict(self._poller.poll(max(0, round((due - now) * 1000))))
        if self._lifeline.fileno() in events and self._lifeline.is_severed():
            self._on_orphaned()
        with self._bulkhead.around("heartbeat"):
            self._take_heartbeats()
        with self._bulkhead.around("heartbeat"):
            self._take_tables()
        now = self._clock()
        if now >= self._refresh_at or (self._has_news() and now >= self._publish_at):
            with self._bulkhead.around("publish"):
                self._publish()
        if now >= self._alive_at:
            self._alive_at = now + ALIVE_S
            self._lifeline.report(Alive(progress=self._shared.progress, is_busy=self._shared.is_busy))

    def _has_news(self) -> bool:
        return self._store.committed[0] != self._published

    def _count_fault(self, where: str) -> None:
        self._store.tally.inc(self._cells.faults[where])

    # --- what comes in ---

    def _take_heartbeats(self) -> None:
        while True:
            try:
                raw = self._heartbeats.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                message = decode_to_beacon(raw)
            except SnapshotError as error:
                self._reject("heartbeat", error)
                continue
            if isinstance(message, Heartbeat):
                self._granter.on_heartbeat(message, self._clock())
                if self._granter.grant is None:  # somebody may export: do not wait for the next commit to say so
                    self._refresh_at = min(self._refresh_at, self._publish_at)
            else:
                self._granter.on_resign(message, self._clock())
                self._refresh_at = 0.0  # another may export: say so at once

    def _take_tables(self) -> None:
        while True:
            try:
                raw = self._tables.recv_multipart(zmq.NOBLOCK)[-1]
            except zmq.Again:
                return
            try:
                self._on_table(decode_deployment(raw))
            except WireError as error:
                self._reject("deployment", error)

    def _reject(self, kind: str, error: Exception) -> None:
        self._store.tally.inc(self._cells.rejected[kind])
        self._bulkhead.faults.rejected(kind, error)

    def _on_table(self, table: Deployment) -> None:
        """Tell the granter and the loop of every API server incarnation that has ended since the last table."""
        if self._table is not None and table.version <= self._table.version:
            return
        self._table = table
        for entry in table.processes:
            if entry.role != API_SERVER:
                continue
            known = self._known.get(entry.index, entry.incarnation)
            for incarnation in range(known, entry.newest_ended + 1):
                self._granter.on_ended(entry.index, incarnation, self._clock())
                self._shared.ended.put((entry.index, incarnation))
                self._refresh_at = 0.0
            self._known[entry.index] = entry.newest_ended + 1

    # --- what goes out ---

    def _publish(self) -> None:
        now = self._clock()
        interval = self._config.stats.publish_interval_s
        self._publish_at = now + interval
        self._refresh_at = now + max(interval, self._config.stats.lease_s / 4)
        self._sequence += 1
        before = self._granter.grant
        grant, echo = self._granter.on_publish(self._sequence, now)
        sequence, cells = self._store.committed
        snapshot = Snapshot(
            layout_digest=self._layout.digest,
            engine=self._config.index,
            incarnation=self._config.incarnation,
            sequence=self._sequence,
            created_unix=self._store.created_unix,
            published_unix=time.time(),
            grant=grant,
            echo=echo,
            is_stuck=self._is_stuck(now),
            cells=self._with_term(cells, grant),
        )
        is_sent = self._publisher.publish(broadcast.TOPIC_TALLY, encode(snapshot))
        self._published = sequence
        self._store.tally.inc(self._cells.snapshots["sent" if is_sent else "dropped"])
        if grant != before and grant is not None:
            log.info(
                "event=grant term=%d.%d api_server=%d incarnation=%d", *grant.term, grant.api_server, grant.incarnation
            )
        self._publish_iterations()

    def _with_term(self, cells: bytes, grant: Grant | None) -> bytes:
        """What was committed, and the one gauge that is this snapshot's own: the term of its grant."""
        patched = bytearray(cells)
        term = 0 if grant is None else grant.term[0] * 1_000_000 + grant.term[1]
        struct.pack_into("<d", patched, CELL_BYTES * self._cells.term, term)
        return bytes(patched)

    def _publish_iterations(self) -> None:
        """Small records for people who watch; made only while somebody does."""
        self._shared.wants_iterations = self._publisher.has_subscribers(broadcast.TOPIC_ITERATIONS)
        while self._shared.iterations:
            record = self._shared.iterations.popleft()
            self._publisher.publish(broadcast.TOPIC_ITERATIONS, msgpack.packb(record))

    def _is_stuck(self, now: float) -> bool:
        """Whether the loop has had work, and made no progress, for the whole stall timeout."""
        seen, since = self._progress
        if self._shared.progress != seen or not self._shared.is_busy:
            self._progress = (self._shared.progress, now)
            return False
        return now - since > self._stall_timeout_s


class _Cells:
    """The cells that only the beacon writes."""

    def __init__(self, layout: Layout) -> None:
        self.snapshots = {r: layout.cell("wholebatch:snapshots_total", result=r) for r in ("sent", "dropped")}
        self.faults = {w: layout.cell("wholebatch:bulkhead_errors_total", where=w) for w in ("publish", "heartbeat")}
        kinds = ("heartbeat", "deployment")
        self.rejected = {k: layout.cell("wholebatch:wire_rejected_total", kind=k) for k in kinds}
        self.term = layout.cell("wholebatch:exporter_term")
