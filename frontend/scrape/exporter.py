"""Whose word on an engine may be passed on, and for how long: this API server's part in the elections, one an engine.

It hears every engine's snapshots and sends every engine heartbeats. `series(engine)` is the newest snapshot that may be
exported: the one held here if this process is the engine's exporter, else the one that the API server holds which is,
of those heard here. What it returns carries an instant; after that nothing of it may be written (P2). None means: leave
the engine's series out.

Times are CLOCK_BOOTTIME: it goes on while the process is stopped and while the host sleeps.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import zmq

from frontend.counters import RequestRecord
from frontend.engines import Identity
from frontend.sockets import Messages, SocketReader
from metrics import broadcast
from metrics.bulkhead import Bulkhead
from metrics.election import Holder
from metrics.files import NOTHING, Held, HeldReader, HeldWriter
from metrics.layout import Layout
from metrics.snapshot import Grant, Position, Snapshot, SnapshotError, decode_snapshot, encode

HEARTBEAT_S: Final = 0.1
SERIES_DEADLINE_S: Final = 0.25
LOOK_AGAIN_S: Final = 0.001
MAX_REMEMBERED: Final = 16  # P9: snapshots of an engine, to export what a slower exporter still holds


def boottime() -> float:
    """Seconds of CLOCK_BOOTTIME, on which leases run."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exportable:
    """An engine's snapshot that may be written into an answer before `expires_at`."""

    snapshot: Snapshot
    expires_at: float


class EngineView:
    """What is known of one engine's broadcasts: the holder, when the last snapshot came, and the latest ones."""

    def __init__(self, holder: Holder, now: float) -> None:
        self.holder = holder
        self.heard_at = now  # as if: who has just started does not call the engine silent
        self._latest: deque[Snapshot] = deque(maxlen=MAX_REMEMBERED)  # the newest last

    @property
    def grant(self) -> Grant | None:
        """The newest grant heard of."""
        return None if self.holder.snapshot is None else self.holder.snapshot.grant

    def on_snapshot(self, snapshot: Snapshot, now: float) -> bool:
        """Keep the snapshot; False when it is older than the one held."""
        if not self.holder.on_snapshot(snapshot, now):
            return False
        self.heard_at = now
        self._latest.append(snapshot)
        return True

    def snapshot_at(self, position: Position) -> Snapshot | None:
        """The snapshot at this position; None if it was not heard, or too long ago."""
        return next((snapshot for snapshot in reversed(self._latest) if snapshot.position == position), None)


class Exporter:
    """All engines of the deployment. `on_load` is told of each snapshot's running and waiting sequences."""

    def __init__(  # noqa: PLR0913  its collaborators, handed in by the one place that makes it
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        directory: str,
        identity: Identity,
        record: RequestRecord,
        bulkhead: Bulkhead,
        layout: Layout,
        *,
        lease_s: float,
        num_api_servers: int,
        on_load: Callable[[int, float], None],
        clock: Callable[[], float] = boottime,
    ) -> None:
        engines = range(len(record.engines))
        self._identity = identity
        self._record = record
        self._bulkhead = bulkhead
        self._layout = layout
        self._clock = clock
        self._lease_s = lease_s
        self._on_load = on_load
        self._num_api_servers = num_api_servers
        self._load_cells = [layout.cell(f"vllm:num_requests_{state}") for state in ("running", "waiting")]
        self.engines = [EngineView(Holder(identity.index, identity.incarnation, lease_s), clock()) for _ in engines]
        endpoints = [broadcast.snapshot_endpoint(directory, engine) for engine in engines]
        subscriber = broadcast.make_subscriber(context, endpoints, [broadcast.TOPIC_TALLY])
        self._reader = SocketReader(subscriber, self._on_messages)
        heartbeat_endpoints = [broadcast.heartbeat_endpoint(directory, engine) for engine in engines]
        self._beats = [broadcast.connect_heartbeats(context, endpoint) for endpoint in heartbeat_endpoints]
        self._writer = HeldWriter(directory, identity.index, len(engines))
        self._others = HeldReader(directory, num_api_servers, len(engines))
        self._beating = asyncio.create_task(self._beat(min(HEARTBEAT_S, lease_s / 6)))

    # --- what may be exported ---

    def held(self, engine: int) -> Exportable | None:
        """The engine's series, if this process is their exporter at this instant."""
        holder = self.engines[engine].holder
        if holder.snapshot is None or not holder.may_export(self._clock()):
            return None
        return Exportable(snapshot=holder.snapshot, expires_at=holder.expires_at)

    async def series(self, engine: int) -> Exportable | None:
        """The engine's series from whoever is their exporter; None after the deadline, or where there is none."""
        deadline = self._clock() + SERIES_DEADLINE_S
        while (found := self.look(engine)) is None:
            now = self._clock()
            if now >= deadline or now - self.engines[engine].heard_at >= self._lease_s:
                return None  # a silent engine's may be exported by nobody
            await asyncio.sleep(LOOK_AGAIN_S)  # between two exporters
        return found

    def look(self, engine: int) -> Exportable | None:
        """The engine's series as they may be exported at this instant: what is held by whom the newest grant names."""
        view, held = self.engines[engine], self.held(engine)
        grant = view.grant
        if held is not None or grant is None or grant.api_server >= self._num_api_servers:
            return held
        found = self._others.read(grant.api_server, engine)
        if found is None or self._clock() >= found.expires_at:
            return None
        snapshot = view.snapshot_at(found.position)
        if snapshot is None or snapshot.grant is None or snapshot.grant.term < grant.term:
            return None
        return Exportable(snapshot=snapshot, expires_at=found.expires_at)

    def heard(self) -> list[Snapshot]:
        """The newest snapshot of every engine heard within the lease, whoever exports it: to decide by, or to add up
        over engines. An engine's own series are `series`."""
        now = self._clock()
        fresh = [view for view in self.engines if now - view.heard_at < self._lease_s]
        return [view.holder.snapshot for view in fresh if view.holder.snapshot is not None]

    def resign(self) -> None:
        """Give up all rights, for good, and tell the engines; no more heartbeats."""
        self._beating.cancel()
        for engine, view in enumerate(self.engines):
            resignation = view.holder.resign()
            self._writer.hold(engine, NOTHING)
            if resignation is not None:
                with self._bulkhead.around("heartbeat"):
                    self._send(engine, encode(resignation))

    async def close(self) -> None:
        """Resign every grant, then close."""
        self._beating.cancel()
        self._reader.close()
        for beat in self._beats:
            beat.close()
        self._writer.close()
        self._others.close()

    # --- the election ---

    def _on_messages(self, messages: Messages) -> None:
        for parts in messages:
            with self._bulkhead.around("snapshot"):
                try:
                    self._on_snapshot(self._check(decode_snapshot(parts[-1])))
                except SnapshotError as error:
                    self._on_rejected(error)

    def _on_snapshot(self, snapshot: Snapshot) -> None:
        view, now = self.engines[snapshot.engine], self._clock()
        if not view.on_snapshot(snapshot, now):
            self._record.engines[snapshot.engine].stale_snapshot()
            return
        may_export = view.holder.may_export(now)
        held = Held(snapshot.position, view.holder.expires_at) if may_export else NOTHING
        self._writer.hold(snapshot.engine, held)  # P3: it is exported here in a later turn, never before
        cells = memoryview(snapshot.cells).cast("d")
        self._on_load(snapshot.engine, sum(cells[cell] for cell in self._load_cells))

    def _check(self, snapshot: Snapshot) -> Snapshot:
        """Raises SnapshotError for one that is not of this deployment."""
        if snapshot.engine >= len(self.engines):
            raise SnapshotError(f"no such engine: {snapshot.engine}")
        if snapshot.layout_digest != self._layout.digest or len(snapshot.cells) != 8 * self._layout.num_cells:
            raise SnapshotError(f"engine {snapshot.engine} has another layout: {snapshot.layout_digest.hex()}")
        return snapshot

    def _on_rejected(self, error: SnapshotError) -> None:
        self._record.wire_rejected("snapshot")
        self._bulkhead.faults.rejected("snapshot", error)

    async def _beat(self, interval_s: float) -> None:
        while True:
            for engine, view in enumerate(self.engines):
                with self._bulkhead.around("heartbeat"):
                    heartbeat = view.holder.heartbeat(self._clock())  # stamped before it is sent: P2 rests on it
                    self._send(engine, encode(heartbeat))
            await asyncio.sleep(interval_s)

    def _send(self, engine: int, raw: bytes) -> None:
        """Never waits: a heartbeat that an engine cannot take is lost, as any may be."""
        try:
            self._beats[engine].send(raw, zmq.NOBLOCK)
        except zmq.Again:
            return
