"""Stand-ins for the world outside a pure core: time, and a network that does its worst."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class FakeClock:
    """A clock that moves when told to. Call it to read it."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        assert seconds >= 0, f"time does not go back: {seconds}"
        self.now += seconds

    def skewed(self, offset: float, rate: float) -> Callable[[], float]:
        """Another process's clock: it started elsewhere and runs a little faster or slower than this one."""
        return lambda: offset + rate * self.now


class LossyChannel(Generic[T]):
    """Messages under way: each may be delivered in any order, late, twice, or never.

    `pick` chooses a message by any number, so that a test's strategy need not know how many there are; 0 is the
    oldest, -1 the newest. At most `capacity` are under way: the oldest are lost."""

    def __init__(self, capacity: int = 16) -> None:
        self._capacity = capacity
        self._under_way: list[T] = []

    def __len__(self) -> int:
        return len(self._under_way)

    def send(self, message: T) -> None:
        self._under_way.append(message)
        del self._under_way[: -self._capacity]

    def deliver(self, pick: int = 0, *, again: bool = False) -> T:
        """Take one message out; `again` leaves it under way, to be delivered another time."""
        index = pick % len(self._under_way)
        return self._under_way[index] if again else self._under_way.pop(index)

    def lose(self, pick: int = 0) -> None:
        del self._under_way[pick % len(self._under_way)]
