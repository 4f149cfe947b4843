"""Whose word on an engine may be passed on, and for how long: this API server's part in the elections, one an engine.

It hears every engine's snapshots and sends every engine heartbeats. `series(engine)` is the newest snapshot that may be
exported: the one held here if this process is the engine's exporter, else one asked of the API server that is. What it
returns carries an instant; after that nothing of it may be written (P2). None means: leave the engine's series out.

Times are CLOCK_BOOTTIME: it goes on while the process is stopped and while the host sleeps.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import zmq

from frontend.bulkhead import Bulkhead
from frontend.engine_client import Identity
from frontend.held_snapshots import Held, HeldSnapshots, Questions
from frontend.request_record import RequestRecord
from frontend.sockets import Messages, SocketReader
from metrics import broadcast
from metrics.election import Holder
from metrics.layout import Layout
from metrics.snapshot import Grant, Snapshot, SnapshotError, decode_snapshot, encode

log = logging.getLogger(__name__)

HEARTBEAT_S: Final = 0.1
ASK_DEADLINE_S: Final = 0.25


def boottime() -> float:
    """The clock of leases."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exportable:
    """An engine's snapshot that may be written into an answer before `expires_at`."""

    snapshot: Snapshot
    expires_at: float


class EngineView:
    """What is known of one engine's broadcasts: the holder, when the last snapshot came, and who awaits the next."""

    def __init__(self, holder: Holder, now: float) -> None:
        self.holder = holder
        self.heard_at = now  # as if: who has just started does not call the engine silent
        self.next_fetch: asyncio.Task[Exportable | None] | None = None
        self.fetching = asyncio.Lock()
        self.question: asyncio.Future[Held | None] | None = None
        self._news = asyncio.Event()

    @property
    def grant(self) -> Grant | None:
        """The newest one heard of."""
        return None if self.holder.snapshot is None else self.holder.snapshot.grant

    def on_snapshot(self, snapshot: Snapshot, now: float) -> bool:
        """False when it is stale. A question is in vain once another than the one asked has the grant."""
        grant = self.grant
        if not self.holder.on_snapshot(snapshot, now):
            return False
        self.heard_at = now
        if self.question is not None and self.grant != grant and not self.question.done():
            self.question.set_result(None)
        self._news.set()
        self._news = asyncio.Event()
        return True

    async def news(self) -> None:
        """Resolves with the next snapshot."""
        await self._news.wait()

    async def changes(self, grant: Grant | None) -> None:
        """Resolves when the newest grant is not this one."""
        while self.grant == grant:
            await self.news()


class Exporter:
    """All engines of the deployment. `on_load` is told of each snapshot's running and waiting sequences."""

    def __init__(
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
        self._asked = HeldSnapshots(directory, identity.index, self._pass_on)
        self._questions = Questions(directory)
        self._beating = asyncio.create_task(self._beat(min(HEARTBEAT_S, lease_s / 6)))
        self._has_logged_rejection = False

    # --- what may be exported ---

    def held(self, engine: int) -> Exportable | None:
        """The engine's series, if this process is their exporter at this instant."""
        holder = self.engines[engine].holder
        if holder.snapshot is None or not holder.may_export(self._clock()):
            return None
        return Exportable(snapshot=holder.snapshot, expires_at=holder.expires_at)

    async def series(self, engine: int) -> Exportable | None:
        """The engine's series from whoever is their exporter; None after the deadline, or where there is none."""
        held = self.held(engine)
        if held is not None:
            return held
        view = self.engines[engine]
        if view.next_fetch is None:
            view.next_fetch = asyncio.create_task(self._fetch_next(engine))
        return await asyncio.shield(view.next_fetch)

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
            if resignation is not None:
                with self._bulkhead.around("heartbeat"):
                    self._send(engine, encode(resignation))

    async def close(self) -> None:
        """Resign first."""
        self._beating.cancel()
        self._reader.close()
        for beat in self._beats:
            beat.close()
        for view in self.engines:
            if view.next_fetch is not None:
                view.next_fetch.cancel()
        self._questions.close()
        self._asked.close()

    # --- the election ---

    def _on_messages(self, messages: Messages) -> None:
        for parts in messages:
            with self._bulkhead.around("snapshot"):
                try:
                    self._on_snapshot(self._check(decode_snapshot(parts[-1])))
                except SnapshotError as error:
                    self._on_rejected(error)

    def _on_snapshot(self, snapshot: Snapshot) -> None:
        if not self.engines[snapshot.engine].on_snapshot(snapshot, self._clock()):
            self._record.engines[snapshot.engine].stale_snapshot()
            return
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
        if not self._has_logged_rejection:
            self._has_logged_rejection = True
            log.error("event=wire_rejected kind=snapshot error=%r further=counted_only", str(error))

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

    # --- asking the exporter, and being asked ---

    def _pass_on(self, engine: Any) -> Held | None:
        """The newest snapshot of an engine whose exporter this process is, for another API server."""
        held = self.held(engine) if isinstance(engine, int) and 0 <= engine < len(self.engines) else None
        if held is None:
            return None
        raw = encode(held.snapshot)
        lease_s = held.expires_at - self._clock()  # P2: the last look, just before it is written
        return (lease_s, raw) if lease_s > 0 else None

    async def _fetch_next(self, engine: int) -> Exportable | None:
        """Who asks while one is under way shares the next one: an answer from before the question could be older than
        what another API server has exported meanwhile (P3)."""
        view = self.engines[engine]
        async with view.fetching:
            view.next_fetch = None
            try:
                async with asyncio.timeout(ASK_DEADLINE_S):
                    return await self._fetch(engine)
            except TimeoutError:
                return None

    async def _fetch(self, engine: int) -> Exportable | None:
        """Ask whom the newest grant names; whenever a newer one comes, ask that one instead. None once the engine is
        silent: then nobody may export."""
        view = self.engines[engine]
        while self._clock() - view.heard_at < self._lease_s:
            grant = view.grant
            held = self.held(engine)
            if held is not None:
                return held
            if grant is not None and grant.names(self._identity.index, self._identity.incarnation):
                await view.news()  # ours, but run out: the next snapshot may renew it
                continue
            answer = await self._ask(engine, grant)
            if answer is not None:
                return answer
            await view.changes(grant)
        return None

    async def _ask(self, engine: int, grant: Grant | None) -> Exportable | None:
        """None: nobody to ask, no answer, or one at an older term than what is known here."""
        if grant is None or grant.api_server >= self._num_api_servers:
            return None
        asked_at = self._clock()  # the lease in the answer is counted from here: earlier than it was written
        view = self.engines[engine]
        view.question = self._questions.ask(grant.api_server, engine)
        found = await view.question
        if found is None:
            return None
        lease_s, raw = found
        try:
            snapshot = self._check(decode_snapshot(raw))
        except SnapshotError as error:
            log.error("event=snapshot_refused engine=%d api_server=%d error=%r", engine, grant.api_server, str(error))
            self._record.fault("snapshot")
            return None
        newest = view.grant
        is_older = newest is not None and (snapshot.grant is None or snapshot.grant.term < newest.term)
        if is_older or snapshot.engine != engine:
            return None
        return Exportable(snapshot=snapshot, expires_at=asked_at + lease_s)
