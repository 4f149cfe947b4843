"""One commit of the tally for everybody who has something to hand over in the same tick of the event loop.

A party counts what it is about to write, the tally is committed, the party writes (P4: count, commit, hand over). With
hundreds of streams that get a token from one iteration that is still one commit, and not one of their coroutines runs.

A commit that fails ends in the bulkhead (P8) and nobody who waits learns of it. Requests go on; what they counted
reaches the file with the next commit that succeeds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from metrics.bulkhead import Bulkhead


class Party(Protocol):
    """Whoever has something to hand over; neither call raises."""

    def count(self) -> None:
        """Count what is about to be handed over."""

    def hand_over(self) -> None:
        """What was counted is committed."""


class GroupCommit:
    """Runs `commit` at most once a tick; use it within one event loop."""

    def __init__(self, commit: Callable[[], None], bulkhead: Bulkhead) -> None:
        self._commit = commit
        self._bulkhead = bulkhead
        self._parties: list[Party] = []
        self._is_due = False

    def join(self, party: Party) -> None:
        """It counts, and hands over, around the next commit, which is in this tick's end at the latest."""
        self._parties.append(party)
        self.soon()

    def now(self) -> None:
        """Commit before returning, with all parties."""
        self._is_due = False
        parties, self._parties = self._parties, []
        for party in parties:
            party.count()
        with self._bulkhead.around("commit"):
            self._commit()
        for party in parties:
            party.hand_over()

    def soon(self) -> None:
        """Commit in this tick's end; nobody waits."""
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._run)

    async def committed(self) -> None:
        """Resolves when everything counted before this call is committed."""
        waiter = _Waiter()
        self.join(waiter)
        await waiter.future

    def _run(self) -> None:
        if self._is_due:
            self.now()


class _Waiter:
    """A coroutine that has counted already. One that is cancelled cancels its own future only."""

    def __init__(self) -> None:
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def count(self) -> None:
        pass

    def hand_over(self) -> None:
        if not self.future.done():
            self.future.set_result(None)
