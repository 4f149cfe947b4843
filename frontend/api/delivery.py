"""One answer on its way to its client: taken, counted, committed, written, without a coroutine in between.

A generation's news make its delivery join the group commit: the delivery takes what has arrived and puts it into words,
which counts it; once all parties' counts are committed, it hands the words over. A stream's words go straight to its
sink. The coroutine of the request sleeps meanwhile, and wakes for what needs one: the first words, before which the
headers go, the last words, a sink that is full, and errors. While it is awake nothing is taken, so that a client which
does not read holds up its own answer only. Measured, one token a write: 12.9 µs a token, with coroutines 26.8.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from frontend.api.answer import Answer, Piece
from frontend.counters import GroupCommit

Sink = Callable[[str], bool]  # writes the words, and says whether it would take more


class Delivery:
    """Delivers one answer. `say` counts pieces and puts them into words, none while there is nothing to write yet."""

    def __init__(self, answer: Answer, group: GroupCommit, say: Callable[[list[Piece]], str]) -> None:
        self._answer = answer
        self._group = group
        self._say = say
        self._sink: Sink | None = None
        self._sleeper: asyncio.Future[str] | None = None
        self._words = ""
        self._has_joined = False
        self._has_news = False
        answer.listen(self._on_news)

    async def next(self, sink: Sink | None = None) -> str:
        """Committed words for the caller to write: the answer's last ones, or, without a sink, whatever has come. They
        are empty where the sink is full. Raises what the answer raises."""
        self._sink = sink
        self._sleeper = asyncio.get_running_loop().create_future()
        if self._has_news:
            self._on_news()
        try:
            return await self._sleeper
        finally:
            self._sleeper = None

    def count(self) -> None:
        """Take what has arrived, if anybody sleeps for it."""
        self._has_joined = False
        sleeper = self._sleeper
        self._has_news = sleeper is None or sleeper.done()
        if sleeper is None or sleeper.done():
            return
        try:
            pieces = self._answer.take()
            if pieces:
                self._words = self._say(pieces)
        except Exception as error:  # noqa: BLE001 - it is the coroutine's, and no concern of the other parties
            sleeper.set_exception(error)

    def hand_over(self) -> None:
        """Into the sink, or to the coroutine."""
        words, self._words = self._words, ""
        sleeper = self._sleeper
        if not words or sleeper is None or sleeper.done():
            return
        if self._sink is None or self._answer.is_delivered:
            sleeper.set_result(words)
            return
        try:
            if not self._sink(words):
                sleeper.set_result("")
        except Exception as error:  # noqa: BLE001 - likewise
            sleeper.set_exception(error)

    def _on_news(self) -> None:
        if not self._has_joined:
            self._has_joined = True
            self._group.join(self)
