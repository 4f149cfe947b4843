"""The beacon, turn by turn, over real sockets: what it publishes, whom it grants to, and that nothing stops it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import msgpack
import pytest
import zmq

from engine import wire
from engine.loop.beacon import Beacon, Shared
from engine.wire.deployment import DEPLOYMENT_TOPIC, Alive, deployment_endpoint
from engine.wire.lifeline import Lifeline, make_lifeline, read_reports
from metrics import broadcast
from metrics.snapshot import NOWHERE, Heartbeat, Position, Resign, Snapshot, decode_snapshot, encode
from tests.contexts import OwningContext
from tests.engine.engine_processes import engine_layout, make_config, open_store, table
from tests.fakes import FakeClock

LEASE_S = 0.6
WAITS = 200


class Air:
    """One beacon, and everybody it talks to, in one thread."""

    def __init__(self, directory: str, incarnation: int = 1) -> None:
        self.clock = FakeClock()
        self.started_at = self.clock.now
        self.layout = engine_layout()
        self.store = open_store(directory, incarnation)
        self.store.commit()
        self.shared = Shared()
        self.supervisor, childs = make_lifeline()
        self.orphaned = 0
        config = make_config(directory, incarnation=incarnation, lease_s=LEASE_S, stall_timeout_s=5.0)
        self.lifeline = Lifeline(childs.detach())
        self.beacon = Beacon(
            config,
            self.layout,
            self.store,
            self.shared,
            self.lifeline,
            clock=self.clock,
            on_orphaned=self._on_orphaned,
        )
        self.context = OwningContext()
        self.tables = broadcast.Publisher(self.context, deployment_endpoint(directory))
        self.beacon._open(self.context)
        self.snapshots = broadcast.make_subscriber(
            self.context, [broadcast.snapshot_endpoint(directory, 0)], [broadcast.TOPIC_TALLY]
        )
        self.watcher = broadcast.make_subscriber(
            self.context, [broadcast.snapshot_endpoint(directory, 0)], [broadcast.TOPIC_ITERATIONS]
        )
        self.beats = broadcast.connect_heartbeats(self.context, broadcast.heartbeat_endpoint(directory, 0))
        self._numbers: dict[int, int] = {}
        self.snapshot()  # everybody is connected

    def _on_orphaned(self) -> None:
        self.orphaned += 1

    def turn(self, seconds: float = 0.05) -> None:
        self.clock.advance(seconds)
        self.beacon.turn()

    def snapshot(self) -> Snapshot:
        """One that is published from now on; older ones may still be under way."""
        before = self.beacon._sequence
        for _ in range(WAITS):
            self.turn()
            while self.snapshots.poll(5):
                snapshot = decode_snapshot(self.snapshots.recv_multipart()[1])
                if snapshot.sequence > before:
                    return snapshot
        raise AssertionError("no snapshot")

    def beat(self, index: int, ack: Position, incarnation: int = 1) -> None:
        number = self._numbers[index] = self._numbers.get(index, 0) + 1
        self.say(encode(Heartbeat(api_server=index, incarnation=incarnation, number=number, ack=ack)))

    def say(self, raw: bytes) -> None:
        for _ in range(WAITS):
            try:
                self.beats.send(raw, zmq.NOBLOCK)
                break
            except zmq.Again:
                self.snapshots.poll(5)
        self.beacon._heartbeats.poll(1000)

    def granted(self, index: int, incarnation: int = 1) -> Snapshot:
        """Heartbeats until this API server is named."""
        for _ in range(20):
            snapshot = self.snapshot()
            if snapshot.grant is not None and snapshot.grant.names(index, incarnation):
                return snapshot
            self.beat(index, snapshot.position, incarnation)
        raise AssertionError("no grant")

    def count(self, name: str, **labels: str) -> float:
        return self.store.tally.cells[self.layout.cell(name, **labels)]

    def close(self) -> None:
        self.context.destroy(linger=0)
        self.lifeline.close()
        self.supervisor.close()
        self.store.close()


@pytest.fixture
def air() -> Iterator[Air]:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as directory:
        air = Air(directory)
        yield air
        air.close()


def test_only_what_was_committed_is_published(air: Air):
    air.store.tally.inc(air.layout.cell("vllm:generation_tokens_total"), 5)
    assert air.snapshot().cells == air.store.committed[1]
    before = air.snapshot()
    air.store.commit()
    after = air.snapshot()
    assert before.cells != after.cells == air.store.committed[1]
    assert after.position > before.position
    assert after.layout_digest == air.layout.digest


def test_a_commit_is_published_after_one_interval_and_silence_lasts_no_quarter_of_a_lease(air: Air):
    air.snapshot()
    sent = air.count("wholebatch:snapshots_total", result="sent")
    for _ in range(2):
        air.turn(0.049)
    assert air.count("wholebatch:snapshots_total", result="sent") == sent, "nothing new to say"
    air.turn(0.053)
    assert air.count("wholebatch:snapshots_total", result="sent") == sent + 1
    air.store.commit()
    air.turn(0.049)
    assert air.count("wholebatch:snapshots_total", result="sent") == sent + 1
    air.turn(0.002)
    assert air.count("wholebatch:snapshots_total", result="sent") == sent + 2


def test_who_beats_and_hears_is_granted_and_keeps_the_grant(air: Air):
    first = air.granted(1)
    assert first.echo > 0
    assert memoryview(first.cells).cast("d")[air.layout.cell("wholebatch:exporter_term")] == 1_000_001
    for _ in range(30):
        snapshot = air.snapshot()
        assert snapshot.grant == first.grant
        air.beat(0, snapshot.position)
        air.beat(1, snapshot.position)


def test_the_first_who_is_live_is_granted_within_a_publish_interval_however_idle_the_engine_is(air: Air):
    heard = air.snapshot()
    air.beat(0, heard.position)
    sent = air.count("wholebatch:snapshots_total", result="sent")
    air.turn(0.001)
    air.turn(0.05)
    assert air.count("wholebatch:snapshots_total", result="sent") == sent + 1
    assert air.beacon._granter.grant is not None
    assert air.beacon._granter.grant.names(0, 1)


def test_who_does_not_hear_makes_nobody_publish_more_than_once_an_interval(air: Air):
    air.snapshot()
    sent = air.count("wholebatch:snapshots_total", result="sent")
    for _ in range(100):
        air.beat(0, NOWHERE)
        air.turn(0.001)
    assert air.count("wholebatch:snapshots_total", result="sent") <= sent + 2


def test_sockets_that_cannot_be_bound_are_an_error_of_the_one_who_starts(air: Air, tmp_path):
    config = make_config(str(tmp_path / "nowhere"))
    beacon = Beacon(config, air.layout, air.store, air.shared, air.lifeline)
    with pytest.raises(broadcast.BroadcastError, match="nowhere"):
        beacon.start()


def test_who_does_not_hear_is_never_granted(air: Air):
    for _ in range(10):
        air.beat(0, NOWHERE)
        assert air.snapshot().grant is None


def test_the_end_of_the_holder_moves_the_grant_at_once_and_is_handed_to_the_loop(air: Air):
    old = air.granted(1)
    assert old.grant is not None
    air.beat(0, old.position)
    air.turn(0.001)
    version = 0
    while air.shared.ended.empty():  # the subscription takes a moment
        version += 1
        air.tables.publish(DEPLOYMENT_TOPIC, wire.encode(table(version, (0, 1, "ready"), (1, 1, "ended"))))
        air.turn(0.0001)
        assert version < 2000
    new = air.snapshot()
    assert new.grant is not None
    assert new.grant.names(0, 1)
    assert new.grant.term > old.grant.term
    assert air.shared.ended.get() == (1, 1)
    assert air.shared.ended.empty()


def test_a_restart_between_two_tables_is_an_end_too(air: Air):
    air.beacon._on_table(table(1, (0, 1, "ready"), (1, 1, "ready")))
    assert air.shared.ended.empty()
    air.beacon._on_table(table(2, (0, 3, "starting"), (1, 1, "ready")))
    assert [air.shared.ended.get_nowait() for _ in range(2)] == [(0, 1), (0, 2)]
    air.beacon._on_table(table(1, (0, 9, "ready"), (1, 9, "ready")))  # an old one, late
    air.beacon._on_table(table(3, (0, 3, "ended"), (1, 1, "ready")))
    air.beacon._on_table(table(4, (0, 4, "ready"), (1, 1, "ready")))
    assert air.shared.ended.get_nowait() == (0, 3)
    assert air.shared.ended.empty()


def test_a_resignation_is_answered_at_once(air: Air):
    held = air.granted(0)
    assert held.grant is not None
    air.beat(1, held.position)
    air.turn(0.001)
    air.say(encode(Resign(api_server=0, incarnation=1, term=held.grant.term)))
    sent = air.count("wholebatch:snapshots_total", result="sent")
    air.turn(0.001)
    assert air.count("wholebatch:snapshots_total", result="sent") == sent + 1
    assert air.snapshot().grant.names(1, 1)  # type: ignore[union-attr]


def test_noise_on_the_heartbeat_socket_is_counted_and_harms_nobody(air: Air):
    for raw in (b"", b"\xc1", b"x" * 10_000):
        air.say(raw)
        air.snapshot()
    assert air.count("wholebatch:wire_rejected_total", kind="heartbeat") == 3
    assert air.granted(0)


def test_a_fault_while_publishing_is_counted_and_the_next_snapshot_comes(air: Air, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> bool:
        raise RuntimeError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(air.beacon._publisher, "publish", fail)
        for _ in range(8):
            air.turn(0.2)
    assert air.count("wholebatch:bulkhead_errors_total", where="publish") > 3
    assert air.snapshot()


def test_a_loop_without_progress_is_said_to_be_stuck_only_while_it_is_busy(air: Air):
    for _ in range(60):
        air.turn(0.15)
    assert not air.snapshot().is_stuck
    air.shared.is_busy = True
    for _ in range(30):
        air.turn(0.15)
    assert not air.snapshot().is_stuck
    for _ in range(10):
        air.turn(0.15)
    assert air.snapshot().is_stuck
    air.shared.progress += 1
    assert not air.snapshot().is_stuck


def test_the_supervisor_hears_of_progress_and_its_end_is_noticed(air: Air):
    air.shared.progress = 42
    air.shared.is_busy = True
    read_reports(air.supervisor)
    for _ in range(4):
        air.turn(0.3)
    reports, _ = read_reports(air.supervisor)
    assert Alive(progress=42, is_busy=True) in reports
    assert len(reports) == 2
    assert air.orphaned == 0
    air.supervisor.close()
    air.turn()
    assert air.orphaned == 1


def test_iterations_are_told_only_while_somebody_watches(air: Air):
    for _ in range(WAITS):
        if air.shared.wants_iterations:
            break
        air.snapshot()
    assert air.shared.wants_iterations
    air.shared.iterations.append({"phase": "decode"})
    air.snapshot()
    assert air.watcher.poll(1000)
    assert msgpack.unpackb(air.watcher.recv_multipart()[1]) == {"phase": "decode"}
    air.watcher.close(linger=0)
    for _ in range(WAITS):
        if not air.shared.wants_iterations:
            return
        air.snapshot()
    raise AssertionError("nobody watches, and yet it is told")


def test_a_restarted_engine_waits_one_lease_before_it_grants():
    with tempfile.TemporaryDirectory() as directory:
        air = Air(directory, incarnation=2)
        snapshot = air.snapshot()
        while snapshot.grant is None:
            air.beat(0, snapshot.position)
            snapshot = air.snapshot()
        assert air.clock.now - air.started_at >= LEASE_S
        assert snapshot.grant.term[0] == 2
        air.close()
