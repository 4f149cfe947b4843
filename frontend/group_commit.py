"""One commit of the tally for everybody who waits in the same tick of the event loop.

A stream counts what it is about to write, waits for `committed()`, then writes (P4: count, commit, hand over). With
hundreds of streams woken by one iteration that is still one commit.

This is a bulkhead (P8): a commit that fails is handed to `on_fault` and nobody who waits learns of it. Requests go
on; what they counted reaches the file with the next commit that succeeds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class GroupCommit:
    """Runs `commit` at most once a tick; use it within one event loop."""

    def __init__(self, commit: Callable[[], None], on_fault: Callable[[Exception], None]) -> None:
        self._commit = commit
        self._on_fault = on_fault
        self._waiters: list[asyncio.Future[None]] = []
        self._is_due = False

    def now(self) -> None:
        """Commit before returning."""
        try:
            self._commit()
        except Exception as error:  # noqa: BLE001 - the bulkhead: whatever is wrong with statistics, requests go on
            self._on_fault(error)

    def soon(self) -> None:
        """Commit in this tick's end; nobody waits."""
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._run)

    async def committed(self) -> None:
        """Resolves when everything counted before this call is committed."""
        # A future for each: a waiter that is cancelled cancels its own only.
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        self.soon()
        await waiter

    def _run(self) -> None:
        self._is_due = False
        waiters, self._waiters = self._waiters, []
        self.now()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
