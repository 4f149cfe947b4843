"""Whether one more request may join the queue: limits on the whole deployment, kept by each API server. Pure.

As in vLLM: `max_num_queued_reqs` limits the sequences in flight, waiting and running, and a request for n takes n
places; `max_num_queued_tokens` refuses requests while so many prompt tokens, or more, are in prefill (the request's own
are not added: a long prompt finds its place when nothing is in the way).

What this API server has in flight is known exactly; what the others have is read from their tallies, at most every
REFRESH_S. So the limits may be passed by what other API servers admit within that time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

from frontend.errors import Overloaded

REFRESH_S: Final = 0.05


class InFlight(NamedTuple):
    """Sequences sent to an engine and not ended, and the prompt tokens of those that have had no token yet."""

    num_sequences: float
    num_prefill_tokens: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits on what may wait; None where there is none."""

    max_num_queued_reqs: int | None = None
    max_num_queued_tokens: int | None = None


class Admission:
    """`own` and `others` say what this API server, and all others together, have in flight."""

    def __init__(
        self,
        limits: Limits,
        own: Callable[[], InFlight],
        others: Callable[[], InFlight],
        on_rejected: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        self._limits = limits
        self._own = own
        self._read_others = others
        self._on_rejected = on_rejected
        self._clock = clock
        self._others = InFlight(0, 0)
        self._read_at = float("-inf")

    def check(self, n: int) -> None:
        """Raises Overloaded, counted by the limit, where a request for n sequences has no place."""
        limits = self._limits
        if limits.max_num_queued_reqs is None and limits.max_num_queued_tokens is None:
            return
        num_sequences, num_tokens = self._in_flight()
        if limits.max_num_queued_reqs is not None and num_sequences + n > limits.max_num_queued_reqs:
            self._reject("max_num_queued_reqs", f"{num_sequences:.0f} requests of {limits.max_num_queued_reqs}")
        if limits.max_num_queued_tokens is not None and num_tokens >= limits.max_num_queued_tokens:
            self._reject("max_num_queued_tokens", f"{num_tokens:.0f} prompt tokens of {limits.max_num_queued_tokens}")

    def _in_flight(self) -> InFlight:
        now = self._clock()
        if now - self._read_at >= REFRESH_S:
            self._others, self._read_at = self._read_others(), now
        own = self._own()
        return InFlight(own.num_sequences + self._others.num_sequences, own[1] + self._others[1])

    def _reject(self, limit: str, found: str) -> None:
        self._on_rejected(limit)
        raise Overloaded(f"the queue is full ({found} are in flight), try again", code=limit)
