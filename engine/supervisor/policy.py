"""Who runs, who is started again, who is killed, and when it all ends: the supervisor's decisions. Pure.

Events and times in, actions out; `engine.supervisor.supervisor` is the loop that obeys. Rules:

- A child starts only after its predecessor's exit was seen; its incarnation is one greater.
- What ends is started again after a back-off of 0.1 to 5 s, which begins anew after 10 s of being ready.
- A ready child that has been silent for the freeze timeout, or is busy and has made no progress for the stall timeout,
  is killed, and then started again. So is one that starts and is silent for two minutes: loading, it reports as well.
- An engine that ends 5 times without getting ready ends the deployment with exit code 1. A `Failed` report before the
  deployment was ever ready ends it with exit code 2: starting again would not help.
- Stopping: API servers first (they let requests finish), then engines; whoever does not end in time is killed.
"""

from __future__ import annotations

import math
import signal
from dataclasses import dataclass, field
from typing import Final

from engine.config import Patience
from engine.wire import STOP_SIGNAL, Alive, Deployment, Facts, Failed, ProcessEntry, Ready, Report
from metrics.catalogue import API_SERVER, ENGINE

MIN_BACKOFF_S: Final = 0.1
MAX_BACKOFF_S: Final = 5.0
STEADY_S: Final = 10.0  # ready for so long: the next back-off begins anew
MAX_FAILURES: Final = 5
SILENCE_S: Final = 2.0  # of a process that reports every half second: the table says so
MAX_STARTING_SILENCE_S: Final = 120.0  # many interpreters that import at once on few cores take most of a minute
ENGINE_END_S: Final = 5.0  # from STOP_SIGNAL to SIGKILL
MAX_TICK_GAP_S: Final = 1.0  # a longer one means that the supervisor itself was stopped
DRAIN_MARGIN_S: Final = 5.0  # an API server's, beyond its drain
SHADOW_S: Final = 0.5  # a signal so soon after the first is the same

Key = tuple[str, int]  # (role, index)


@dataclass(frozen=True, slots=True)
class Spawn:
    """Start this incarnation."""

    role: str
    index: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class Kill:
    """Send a signal; `why` is for the log."""

    role: str
    index: int
    signal: int
    why: str


@dataclass(frozen=True, slots=True)
class Exit:
    """Everything has ended; `message` is for the operator."""

    code: int
    message: str = ""


Action = Spawn | Kill | Exit


@dataclass(slots=True)
class _Child:
    role: str
    index: int
    incarnation: int = 0
    pid: int = 0
    state: str = "ended"
    start_at: float = 0.0  # when to start it, while it has ended
    backoff_s: float = MIN_BACKOFF_S
    ready_at: float = 0.0
    alive_at: float = 0.0
    progress: int = -1
    progress_at: float = 0.0
    failures: int = 0  # ends without getting ready, in a row
    kill_at: float | None = None  # when patience with an end that was asked for is over
    is_killed: bool = False


@dataclass(slots=True)
class Supervision:
    """The state of one deployment. Call `tick` often; after every event there may be actions at once."""

    num_engines: int
    num_api_servers: int
    patience: Patience
    facts: Facts | None = None
    version: int = 0  # of the table; grows with every change
    has_been_ready: bool = False
    _children: dict[Key, _Child] = field(default_factory=dict)
    _ticked_at: float | None = None
    _told_at: float = 0.0  # when the last signal came
    _stopping: str = ""  # "", API_SERVER (they drain), ENGINE (they end)
    _exit: Exit = field(default_factory=lambda: Exit(0))

    def __post_init__(self) -> None:
        for index in range(self.num_engines):
            self._children[ENGINE, index] = _Child(ENGINE, index)
        for index in range(self.num_api_servers):
            self._children[API_SERVER, index] = _Child(API_SERVER, index)

    # --- what is known ---

    @property
    def is_stopping(self) -> bool:
        return bool(self._stopping)

    @property
    def is_serving(self) -> bool:
        """Whether at least one engine and one API server are ready."""
        return {ENGINE, API_SERVER} <= {c.role for c in self._children.values() if c.state == "ready"}

    @property
    def is_whole(self) -> bool:
        """Whether every child is ready."""
        return all(child.state == "ready" for child in self._children.values())

    def table(self) -> Deployment:
        """The deployment table to publish. Silence comes and goes without a new version."""
        now = self._ticked_at or 0.0
        rows = (
            ProcessEntry(
                role=c.role,
                index=c.index,
                incarnation=c.incarnation,
                pid=c.pid,
                state=c.state,
                is_silent=c.state == "ready" and now - c.alive_at > SILENCE_S,
            )
            for c in self._children.values()
        )
        return Deployment(version=self.version, facts=self.facts, processes=tuple(rows))

    # --- what happens ---

    def on_spawned(self, role: str, index: int, pid: int, now: float) -> None:
        """A `Spawn` was carried out."""
        child = self._children[role, index]
        child.incarnation += 1
        child.pid, child.state, child.is_killed, child.kill_at = pid, "starting", False, None
        child.alive_at = child.progress_at = now
        self.version += 1

    def on_report(self, role: str, index: int, report: Report, now: float) -> list[Action]:
        """A child has said something about itself."""
        child = self._children[role, index]
        child.alive_at = now
        match report:
            case Ready(facts=facts):
                return self._on_ready(child, facts, now)
            case Alive(progress=progress, is_busy=is_busy):
                if progress != child.progress or not is_busy:
                    child.progress, child.progress_at = progress, now
            case Failed(message=message) if not self.has_been_ready and not self._stopping:
                return self._stop(Exit(2, message), now, kill=True)
        return []

    def _on_ready(self, child: _Child, facts: Facts | None, now: float) -> list[Action]:
        if child.state != "starting":
            return []
        if child.role == ENGINE and facts is not None:
            self.facts = self.facts or facts
            if facts != self.facts:  # loaded at the same time as the first; the next incarnation is given the facts
                return self._kill(child, f"facts differ: {facts}")
        child.state, child.ready_at, child.failures = "ready", now, 0
        child.progress_at = now
        self.version += 1
        self.has_been_ready = self.has_been_ready or self.is_serving
        return []

    def on_exit(self, role: str, index: int, now: float) -> list[Action]:
        """A child has ended, by itself or not."""
        child = self._children[role, index]
        was_ready = child.ready_at > 0.0
        steady = was_ready and now - child.ready_at >= STEADY_S
        child.backoff_s = MIN_BACKOFF_S if steady else child.backoff_s
        child.start_at = now + child.backoff_s
        child.backoff_s = min(MAX_BACKOFF_S, 2 * child.backoff_s)
        child.state, child.kill_at, child.ready_at, child.progress = "ended", None, 0.0, -1
        child.failures += not was_ready
        self.version += 1
        # An API server that fails while others serve is started again for ever; before that, nobody could be served.
        matters = role == ENGINE or not self.has_been_ready
        if matters and child.failures >= MAX_FAILURES and not self._stopping:
            message = f"{role} {index} ended {MAX_FAILURES} times without getting ready"
            return self._stop(Exit(1, message), now, kill=True)
        return self._advance(now)

    def on_signal(self, now: float) -> list[Action]:
        """SIGTERM, SIGINT or SIGHUP: the first stops in order, a second one at once. What follows the first like its
        shadow is no second thought: `timeout` signals a process and then its group, a terminal the whole group."""
        if self.is_stopping and now - self._told_at < SHADOW_S:
            return []
        self._told_at = now
        return self._stop(Exit(0), now, kill=self.is_stopping)

    def tick(self, now: float) -> list[Action]:
        """Do what is due by time alone."""
        self._forgive(now)
        actions = self._advance(now)
        for child in self._children.values():
            if child.state == "ended":
                if not self._stopping and now >= child.start_at:
                    actions.append(Spawn(child.role, child.index, child.incarnation + 1))
            elif child.kill_at is not None and now >= child.kill_at:
                actions += self._kill(child, "does not end")
            elif now - child.alive_at > self._longest_silence_s(child):
                actions += self._kill(child, "frozen")
            elif child.state == "ready" and now - child.progress_at > self.patience.stall_timeout_s:
                actions += self._kill(child, "stuck")
        return actions

    def _longest_silence_s(self, child: _Child) -> float:
        """A child that was told to end is judged by its end alone."""
        by_state = {"starting": MAX_STARTING_SILENCE_S, "ready": self.patience.freeze_timeout_s}
        return by_state.get(child.state, math.inf)

    def _forgive(self, now: float) -> None:
        """While the supervisor did not look, nobody was silent or stuck: its own freeze is not its children's."""
        gap = 0.0 if self._ticked_at is None else now - self._ticked_at
        self._ticked_at = now
        if gap > MAX_TICK_GAP_S:
            for child in self._children.values():
                child.alive_at = min(now, child.alive_at + gap)
                child.progress_at = min(now, child.progress_at + gap)
                child.kill_at = None if child.kill_at is None else child.kill_at + gap

    def _kill(self, child: _Child, why: str) -> list[Action]:
        if child.is_killed:
            return []
        child.is_killed = True
        return [Kill(child.role, child.index, signal.SIGKILL, why)]

    # --- the end ---

    def _stop(self, exit_: Exit, now: float, *, kill: bool) -> list[Action]:
        if not self._stopping:
            self._stopping = API_SERVER
            self._exit = exit_
            self.version += 1
        if kill:
            self._stopping = ENGINE
            killed = [action for c in self._running() for action in self._kill(c, exit_.message or "told twice to end")]
            return killed + self._advance(now)
        return self._terminate(API_SERVER, now) + self._advance(now)

    def _running(self) -> list[_Child]:
        return [child for child in self._children.values() if child.state != "ended"]

    def _terminate(self, role: str, now: float) -> list[Action]:
        wait_s = self.patience.drain_timeout_s + DRAIN_MARGIN_S if role == API_SERVER else ENGINE_END_S
        actions: list[Action] = []
        self.version += 1
        for child in self._running():
            if child.role == role and child.state != "stopping":
                child.state, child.kill_at = "stopping", now + wait_s
                actions.append(Kill(child.role, child.index, STOP_SIGNAL, "stopping"))
        return actions

    def _advance(self, now: float) -> list[Action]:
        """From API servers that have all ended to the engines, and from these to the exit."""
        if not self._stopping:
            return []
        running = self._running()
        if not running:
            return [self._exit]
        if self._stopping == API_SERVER and all(child.role == ENGINE for child in running):
            self._stopping = ENGINE
            return self._terminate(ENGINE, now)
        return []
