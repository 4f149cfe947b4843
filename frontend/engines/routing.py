"""Which engine gets this request: the least loaded one. Pure.

The load of an engine is what it says itself, in its newest snapshot (sequences running and waiting), corrected by
what this API server has submitted or seen end since. Kept as two numbers an engine: *ours*, what this API server has
open there, exact at any time; and *others*, what the snapshot said beyond ours when it came.

NOTE: while an engine computes one long iteration its snapshots repeat old numbers. A repeated number says nothing
about what was submitted meanwhile, so `others` is only taken anew when the engine's own number has changed.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class _Engine:
    is_ready: bool = False
    ours: int = 0
    others: float = 0.0
    said: float = -1.0  # the load in the newest snapshot

    @property
    def load(self) -> float:
        return self.others + self.ours


class Router:
    """Chooses among ready engines; equally loaded ones take turns."""

    def __init__(self, num_engines: int) -> None:
        self._engines = [_Engine() for _ in range(num_engines)]
        self._next = 0

    def on_ready(self, engine: int) -> None:
        """A new incarnation takes requests; nothing is known of its load, and nothing of ours is open there."""
        self._engines[engine] = _Engine(is_ready=True)

    def on_ended(self, engine: int) -> None:
        """The engine takes no more requests."""
        self._engines[engine] = _Engine()

    def on_load(self, engine: int, load: float) -> None:
        """A snapshot said how many sequences run and wait there, those of every API server."""
        state = self._engines[engine]
        if load != state.said:
            state.said = load
            state.others = max(0.0, load - state.ours)

    def on_open(self, engine: int, num_sequences: int) -> None:
        """How many sequences this API server has open there now."""
        self._engines[engine].ours = num_sequences

    def has_ready(self) -> bool:
        """Whether any engine takes requests."""
        return any(state.is_ready for state in self._engines)

    def choose(self) -> int | None:
        """The engine for the next request; None while no engine is ready."""
        num_engines = len(self._engines)
        order = [(self._next + i) % num_engines for i in range(num_engines)]
        ready = [engine for engine in order if self._engines[engine].is_ready]
        if not ready:
            return None
        chosen = min(ready, key=lambda engine: self._engines[engine].load)
        self._next = (chosen + 1) % num_engines
        return chosen
