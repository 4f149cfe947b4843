"""The supervisor's decisions against a model too simple to be wrong: children that live, end, freeze and get stuck."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.config import Patience
from engine.supervisor.policy import (
    DRAIN_MARGIN_S,
    ENGINE_END_S,
    MAX_BACKOFF_S,
    MAX_STARTING_SILENCE_S,
    Action,
    Exit,
    Kill,
    Spawn,
    Supervision,
)
from engine.wire import STOP_SIGNAL
from engine.wire.deployment import Alive, Facts, Failed, Ready, Report
from metrics.catalogue import API_SERVER, ENGINE

FACTS = Facts(
    model_name="tiny",
    max_model_len=512,
    vocab_size=300,
    block_size=16,
    num_gpu_blocks=64,
    cache_dtype="float32",
    enable_prefix_caching=True,
)
OTHER_FACTS = Facts(**{name: getattr(FACTS, name) for name in FACTS.__slots__} | {"num_gpu_blocks": 65})
PATIENCE = Patience(freeze_timeout_s=10.0, stall_timeout_s=60.0, drain_timeout_s=30.0)


class World:
    """Carries out what is decided, with a clock of its own. Process ids count up."""

    def __init__(self, num_engines: int = 1, num_api_servers: int = 2) -> None:
        self.machine = Supervision(num_engines, num_api_servers, PATIENCE)
        self.now = 1000.0
        self.running: dict[tuple[str, int], int] = {}  # (role, index) -> incarnation
        self.spawned: list[Spawn] = []
        self.spawned_at: list[float] = []
        self.signals: list[Kill] = []
        self.exit: Exit | None = None
        self.pid = 100

    def state(self, role: str, index: int) -> str:
        found = self.machine.table().find(role, index)
        assert found is not None
        return found.state

    def obey(self, actions: list[Action]) -> None:
        for action in actions:
            assert self.exit is None, f"after the exit: {action}"
            match action:
                case Spawn(role, index, incarnation):
                    assert (role, index) not in self.running, f"two of {role} {index}"
                    assert not self.machine.is_stopping, "a start while stopping"
                    self.running[role, index] = incarnation
                    self.spawned.append(action)
                    self.spawned_at.append(self.now)
                    self.pid += 1
                    self.machine.on_spawned(role, index, self.pid, self.now)
                case Kill():
                    self.signals.append(action)
                case Exit():
                    assert not self.running, f"an exit with children running: {self.running}"
                    self.exit = action

    def tick(self, seconds: float = 0.0) -> None:
        self.now += seconds
        self.obey(self.machine.tick(self.now))

    def report(self, role: str, index: int, report: Ready | Alive | Failed) -> None:
        self.obey(self.machine.on_report(role, index, report, self.now))

    def end(self, role: str, index: int) -> None:
        del self.running[role, index]
        self.obey(self.machine.on_exit(role, index, self.now))

    def start(self) -> World:
        """Everything started and ready."""
        self.tick()
        for role, index in list(self.running):
            self.report(role, index, Ready(facts=FACTS if role == ENGINE else None))
        assert self.machine.is_whole
        return self

    def live(
        self, seconds: float, *, silent: tuple[str, int] | None = None, busy: bool = False, progresses: bool = True
    ) -> None:
        """Time passes; everybody but the silent one reports twice a second."""
        for _ in range(round(seconds * 2)):
            self.tick(0.5)
            for role, index in list(self.running):
                if (role, index) != silent:
                    progress = round(self.now * 2) if progresses else 7
                    self.report(role, index, Alive(progress=progress, is_busy=busy))

    def killed(self) -> list[tuple[str, int]]:
        return [(kill.role, kill.index) for kill in self.signals if kill.signal == signal.SIGKILL]


def test_everything_is_started_once_and_the_first_facts_are_kept():
    world = World(num_engines=2, num_api_servers=3).start()
    assert sorted((s.role, s.index, s.incarnation) for s in world.spawned) == [
        (API_SERVER, 0, 1),
        (API_SERVER, 1, 1),
        (API_SERVER, 2, 1),
        (ENGINE, 0, 1),
        (ENGINE, 1, 1),
    ]
    assert world.machine.facts == FACTS
    world.live(30)
    assert len(world.spawned) == 5
    assert not world.signals


def test_an_engine_with_other_facts_is_never_ready_and_is_started_again():
    world = World(num_engines=2, num_api_servers=1)
    world.tick()
    world.report(ENGINE, 1, Ready(facts=FACTS))
    world.report(ENGINE, 0, Ready(facts=OTHER_FACTS))
    assert world.killed() == [(ENGINE, 0)]
    assert world.state(ENGINE, 0) == "starting"
    world.end(ENGINE, 0)
    world.tick(0.2)
    world.report(ENGINE, 0, Ready(facts=FACTS))
    assert world.state(ENGINE, 0) == "ready"
    assert world.machine.facts == FACTS


def test_what_ends_is_started_again_with_the_next_incarnation_and_growing_delay():
    world = World().start()
    delays = []
    for incarnation in range(2, 11):
        ended_at = world.now
        world.end(API_SERVER, 1)
        while (API_SERVER, 1) not in world.running:
            world.tick(0.01)
        assert world.spawned[-1] == Spawn(API_SERVER, 1, incarnation)
        delays.append(world.now - ended_at)
    expected = [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0]
    assert all(abs(d - e) < 0.02 for d, e in zip(delays, expected, strict=True)), delays


def test_the_delay_begins_anew_after_ten_seconds_of_being_ready():
    world = World().start()
    for _ in range(4):
        world.end(API_SERVER, 1)
        world.tick(5.1)
    world.report(API_SERVER, 1, Ready())
    world.live(10.5)
    world.end(API_SERVER, 1)
    world.tick(0.11)
    assert (API_SERVER, 1) in world.running


def test_a_silent_process_is_killed_after_the_freeze_timeout_and_not_before():
    for frozen in ((ENGINE, 0), (API_SERVER, 1)):
        world = World().start()
        world.live(9.5, silent=frozen)
        assert not world.signals
        world.live(1.0, silent=frozen)
        assert [(k.role, k.index, k.signal, k.why) for k in world.signals] == [(*frozen, signal.SIGKILL, "frozen")]


def test_the_table_says_long_before_the_freeze_timeout_that_a_process_is_silent():
    def silent(world: World) -> list[tuple[str, int]]:
        return [(entry.role, entry.index) for entry in world.machine.table().processes if entry.is_silent]

    for frozen in ((ENGINE, 0), (API_SERVER, 1)):
        world = World().start()
        world.live(60)
        world.live(2.0, silent=frozen)
        assert silent(world) == []
        world.live(0.5, silent=frozen)
        assert silent(world) == [frozen]
        world.live(0.5)
        assert silent(world) == []
        world.live(3.0, silent=frozen)
        world.end(*frozen)
        assert silent(world) == []


def test_a_process_that_freezes_while_it_starts_is_killed_and_one_that_loads_for_an_hour_is_not():
    for frozen in ((ENGINE, 0), (API_SERVER, 1)):
        world = World()
        world.tick()
        world.live(3600)
        assert not world.signals
        world.live(MAX_STARTING_SILENCE_S - 0.5, silent=frozen)
        assert not world.signals
        world.live(1.0, silent=frozen)
        assert [(k.role, k.index, k.signal, k.why) for k in world.signals] == [(*frozen, signal.SIGKILL, "frozen")]


def test_a_supervisor_that_was_frozen_does_not_take_its_own_silence_for_its_childrens():
    world = World().start()
    world.live(5, silent=(ENGINE, 0))
    world.tick(300.0)  # and only then what was reported meanwhile is read
    assert not world.signals
    world.live(4, silent=(ENGINE, 0))
    assert not world.signals
    world.live(2, silent=(ENGINE, 0))
    assert world.killed() == [(ENGINE, 0)]


def test_a_busy_engine_without_progress_is_killed_after_the_stall_timeout_and_an_idle_one_never():
    world = World().start()
    world.live(200, busy=True)
    world.live(200, progresses=False)
    assert not world.signals
    world.live(59, busy=True, progresses=False)
    assert not world.signals
    world.live(3, busy=True, progresses=False)
    assert (ENGINE, 0) in world.killed()
    assert {kill.why for kill in world.signals} == {"stuck"}


def test_five_ends_before_ready_end_the_deployment_with_code_1():
    world = World()
    for _ in range(5):
        world.tick(6.0)
        assert world.exit is None
        world.end(ENGINE, 0)
    assert sorted(world.killed()) == [(API_SERVER, 0), (API_SERVER, 1)]
    for index in range(2):
        world.end(API_SERVER, index)
    assert world.exit == Exit(1, "engine 0 ended 5 times without getting ready")


def test_api_servers_that_never_get_ready_end_a_deployment_that_has_never_served():
    world = World()
    world.tick()
    for _ in range(5):
        world.end(API_SERVER, 0)
        world.tick(5.1)
    for key in list(world.running):
        world.end(*key)
    assert world.exit == Exit(1, "api-server 0 ended 5 times without getting ready")


def test_api_servers_may_fail_for_ever_once_there_was_service():
    world = World().start()
    for _ in range(30):
        world.end(API_SERVER, 0)
        world.tick(5.1)
        world.report(ENGINE, 0, Alive(progress=0, is_busy=False))
        world.report(API_SERVER, 1, Alive(progress=0, is_busy=False))
    assert world.exit is None
    assert world.running[API_SERVER, 0] == 31


def test_a_model_that_cannot_be_served_ends_the_start_with_code_2_and_its_line():
    world = World()
    world.tick()
    world.report(ENGINE, 0, Failed(message="no such tensor"))
    for role, index in list(world.running):
        world.end(role, index)
    assert world.exit == Exit(2, "no such tensor")


def test_a_failure_to_start_again_is_no_reason_to_end_what_serves():
    world = World().start()
    world.end(ENGINE, 0)
    world.tick(0.2)
    world.report(ENGINE, 0, Failed(message="out of memory"))
    world.end(ENGINE, 0)
    assert world.exit is None
    world.tick(0.5)
    assert world.running[ENGINE, 0] == 3


def test_a_signal_stops_api_servers_first_and_then_engines():
    world = World().start()
    world.obey(world.machine.on_signal(world.now))
    assert [(k.role, k.index, k.signal) for k in world.signals] == [
        (API_SERVER, 0, STOP_SIGNAL),
        (API_SERVER, 1, STOP_SIGNAL),
    ]
    world.end(API_SERVER, 0)
    world.end(API_SERVER, 1)
    assert (world.signals[-1].role, world.signals[-1].signal) == (ENGINE, STOP_SIGNAL)
    assert world.exit is None
    world.end(ENGINE, 0)
    assert world.exit == Exit(0)


def test_who_does_not_end_in_time_is_killed():
    world = World().start()
    world.obey(world.machine.on_signal(world.now))
    world.end(API_SERVER, 0)
    world.live(34.5)
    assert not world.killed()
    world.live(1)
    assert world.killed() == [(API_SERVER, 1)]
    world.end(API_SERVER, 1)
    world.live(5.5)
    assert world.killed() == [(API_SERVER, 1), (ENGINE, 0)]


def test_a_drain_is_given_the_time_that_the_whole_host_stood_still():
    world = World().start()
    world.obey(world.machine.on_signal(world.now))
    world.live(10)
    world.tick(500)
    world.live(24)
    assert not world.killed()
    world.live(2)
    assert sorted(world.killed()) == [(API_SERVER, 0), (API_SERVER, 1)]


def test_an_api_server_that_fails_before_anything_served_says_why():
    world = World()
    world.tick()
    world.report(ENGINE, 0, Ready(facts=FACTS))
    world.report(API_SERVER, 0, Failed(message="no tokenizer"))
    for role, index in list(world.running):
        world.end(role, index)
    assert world.exit == Exit(2, "no tokenizer")


def test_an_engine_that_was_ready_may_fail_again_four_times_but_not_five():
    world = World().start()
    for _ in range(5):
        world.end(ENGINE, 0)
        world.tick(5.1)
        assert not world.machine.is_stopping
    world.end(ENGINE, 0)
    assert world.machine.is_stopping
    assert "ended 5 times" in world.signals[-1].why


def test_a_signal_that_comes_twice_is_one():
    world = World().start()
    world.obey(world.machine.on_signal(world.now))
    world.tick(0.4)
    world.obey(world.machine.on_signal(world.now))
    assert not world.killed()


def test_a_second_signal_kills_at_once():
    world = World().start()
    world.obey(world.machine.on_signal(world.now))
    world.tick(0.6)
    world.obey(world.machine.on_signal(world.now))
    assert sorted(world.killed()) == [(API_SERVER, 0), (API_SERVER, 1), (ENGINE, 0)]
    for role, index in list(world.running):
        world.end(role, index)
    assert world.exit == Exit(0)


@dataclass
class _Seen:
    version: int = -1
    processes: object = None


class AnyLife(RuleBasedStateMachine):
    """Whatever children do: incarnations grow by one, nobody runs twice, a table's version says that it is new, and
    a stop always comes to its end."""

    @initialize(engines=st.integers(1, 2), servers=st.integers(1, 3))
    def begin(self, engines: int, servers: int) -> None:
        self.world = World(engines, servers)
        self.seen = _Seen()
        self.last = dict.fromkeys(self.world.machine._children, 0)
        self.num_spawned = 0
        self.has_served = False
        self.failures: dict[tuple[str, int], int] = {}  # ends without getting ready, in a row
        self.code: int | None = None  # of the exit, from the first reason for it

    @property
    def ends(self) -> bool:
        return self.world.exit is not None

    def pick(self, number: int) -> tuple[str, int] | None:
        keys = sorted(self.world.running)
        return keys[number % len(keys)] if keys else None

    @rule(seconds=st.sampled_from([0.0, 0.05, 0.3, 2.0, 11.0, 70.0]))
    def tick(self, seconds: float) -> None:
        if not self.ends:
            self.world.tick(seconds)

    @rule(number=st.integers(0, 9), kind=st.sampled_from(["ready", "other", "alive", "busy", "failed"]))
    @precondition(lambda self: not self.ends)
    def report(self, number: int, kind: str) -> None:
        key = self.pick(number)
        if key is None:
            return
        facts = {"ready": FACTS, "other": OTHER_FACTS}.get(kind) if key[0] == ENGINE else None
        reports: dict[str, Report] = {
            "alive": Alive(progress=number, is_busy=False),
            "busy": Alive(progress=1, is_busy=True),
            "failed": Failed(message="no"),
        }
        if kind == "failed" and not self.has_served and self.code is None:
            self.code = 2
        self.world.report(*key, reports.get(kind, Ready(facts=facts)))
        if self.world.state(*key) == "ready":
            self.failures[key] = 0

    @rule(number=st.integers(0, 9))
    @precondition(lambda self: not self.ends)
    def end(self, number: int) -> None:
        key = self.pick(number)
        if key is None:
            return
        state = self.world.state(*key)
        self.failures[key] = self.failures.get(key, 0) + 1 if state == "starting" else 0
        matters = key[0] == ENGINE or not self.world.machine.has_been_ready
        if matters and self.failures[key] >= 5 and self.code is None:
            self.code = 1
        self.world.end(*key)

    @rule()
    @precondition(lambda self: not self.ends)
    def signal(self) -> None:
        self.code = 0 if self.code is None else self.code
        self.world.obey(self.world.machine.on_signal(self.world.now))

    @invariant()
    def an_exit_has_the_code_of_the_first_reason_for_it(self) -> None:
        self.has_served = self.has_served or self.world.machine.is_serving
        assert self.world.machine.is_stopping == (self.code is not None)
        if self.world.exit is not None:
            assert self.world.exit.code == self.code

    @invariant()
    def incarnations_grow_by_one(self) -> None:
        for spawn in self.world.spawned[self.num_spawned :]:
            key = (spawn.role, spawn.index)
            assert spawn.incarnation == self.last[key] + 1
            self.last[key] = spawn.incarnation
        self.num_spawned = len(self.world.spawned)

    @invariant()
    def a_changed_table_has_a_greater_version(self) -> None:
        table = self.world.machine.table()
        if self.seen.processes is not None and (table.facts, table.processes) != self.seen.processes:
            assert table.version > self.seen.version
        assert table.version >= self.seen.version
        self.seen = _Seen(table.version, (table.facts, table.processes))

    @invariant()
    def the_table_is_the_truth(self) -> None:
        table = self.world.machine.table()
        running = {(p.role, p.index): p.incarnation for p in table.processes if p.state != "ended"}
        assert running == self.world.running

    def teardown(self) -> None:
        """What has ended runs again after at most the longest back-off. A stop comes to its end within its bounds,
        even if nobody does as he is told before he is killed."""
        if not hasattr(self, "world") or self.ends:
            return
        if not self.world.machine.is_stopping:
            self.world.tick(MAX_BACKOFF_S)
            assert self.world.running.keys() == self.last.keys()
        self.world.obey(self.world.machine.on_signal(self.world.now))
        bound = PATIENCE.drain_timeout_s + DRAIN_MARGIN_S + ENGINE_END_S
        for _ in range(round(bound) + 3):
            if self.ends:
                return
            self.world.tick(1.0)
            for key in {(k.role, k.index) for k in self.world.signals if k.signal == signal.SIGKILL}:
                if key in self.world.running:
                    self.world.end(*key)
        raise AssertionError(f"still running: {self.world.running}")


TestAnyLife = AnyLife.TestCase
TestAnyLife.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
