"""One HTTP request's sequences, from the engine's tokens to pieces of text, and the account of every token.

A piece is what one wake-up adds to one choice; tokens whose text is still held back (half a character, the beginning
of a stop string) wait and come with the next piece. P4: whoever writes pieces first calls `deliver`, then awaits
`committed`, then writes; and `close` in a finally.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol

from engine.wire import Finish, Start, TokenLogprobs
from frontend.detokenizer import SequenceText
from frontend.errors import GenerationFailed


class Delta(Protocol):
    """New tokens of one of a generation's sequences."""

    index: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish: Finish | None
    start: Start | None


class Generation(Protocol):
    """One prompt's n sequences at an engine, and what is counted about them; `frontend.engine_client` makes these."""

    def __aiter__(self) -> AsyncIterator[Sequence[Delta]]: ...

    def stop(self, index: int) -> None: ...

    def delivered(self, num_tokens: int) -> None: ...

    def undelivered(self, num_tokens: int, reason: str) -> None: ...

    def finish(self) -> None: ...

    async def committed(self) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class ShownToken:
    """A token with its log probabilities; `offset` counts the characters of the answer before it."""

    token_id: int
    offset: int
    logprobs: TokenLogprobs


@dataclass(slots=True)
class Piece:
    """What is new of one choice. `tokens` is filled only where log probabilities were asked for."""

    choice: int
    text: str = ""
    num_tokens: int = 0
    tokens: list[ShownToken] = field(default_factory=list)
    finish_reason: str | None = None

    def extend(self, later: Piece) -> None:
        """Make this piece the two together."""
        self.text += later.text
        self.num_tokens += later.num_tokens
        self.tokens += later.tokens
        self.finish_reason = later.finish_reason


class _Choice:
    """One sequence: its text, and the piece that is being gathered."""

    __slots__ = ("_piece", "_shows_stop_token", "_text", "is_finished", "num_cached_tokens")

    def __init__(self, number: int, text: SequenceText, *, shows_stop_token: bool) -> None:
        self._piece = Piece(number)
        self._text = text
        self._shows_stop_token = shows_stop_token
        self.is_finished = False
        self.num_cached_tokens: int | None = None  # known with the first token

    def take(self, delta: Delta) -> int:
        """Add the tokens; returns how many came after a stop string and belong to no answer."""
        if delta.start is not None:
            self.num_cached_tokens = delta.start.num_cached_tokens
        hidden = self._num_hidden(delta)
        shown = []
        for position, token_id in enumerate(delta.token_ids):
            if delta.logprobs is not None:
                logprobs = delta.logprobs[position]
                self._piece.tokens.append(ShownToken(token_id, self._text.num_characters, logprobs))
            if position >= len(delta.token_ids) - hidden:
                self._text.append_unseen()
            else:
                shown.append(self._text.append(token_id))
            self._piece.num_tokens += 1
            if self._text.has_stopped:
                break
        num_taken = position + 1 if delta.token_ids else 0
        self._piece.text += "".join(shown)
        self._end(delta.finish)
        return len(delta.token_ids) - num_taken

    def _num_hidden(self, delta: Delta) -> int:
        """1 where the last token is the one that the engine stopped at: end of text, or one of `stop_token_ids`."""
        stopped = delta.finish is not None and delta.finish.reason == "stop"
        return int(stopped and not self._shows_stop_token and len(delta.token_ids) > 0)

    def _end(self, finish: Finish | None) -> None:
        if finish is not None:
            self._piece.text += self._text.finish()
            self._piece.finish_reason = finish.reason
        if self._text.has_stopped:
            self._piece.finish_reason = "stop"
        self.is_finished = self._piece.finish_reason is not None

    @property
    def has_stopped(self) -> bool:
        """Whether a stop string ended it."""
        return self._text.has_stopped

    def pop_piece(self) -> Piece | None:
        """What can be shown now."""
        if not self._piece.text and self._piece.finish_reason is None:
            return None
        piece, self._piece = self._piece, Piece(self._piece.choice)
        return piece


class Answer:
    """All choices of a request: prompt p's sequence i is choice p * n + i."""

    def __init__(
        self,
        generations: Sequence[Generation],
        new_text: Callable[[], SequenceText],
        *,
        n: int,
        shows_stop_token: bool = False,
    ) -> None:
        self._generations = generations
        self._n = n
        numbers = range(len(generations) * n)
        self._choices = [_Choice(number, new_text(), shows_stop_token=shows_stop_token) for number in numbers]
        self._num_undelivered = [n] * len(generations)  # choices of each prompt whose last piece is not delivered
        self.num_completion_tokens = 0

    @property
    def is_delivered(self) -> bool:
        """Whether every choice's last piece was delivered."""
        return not any(self._num_undelivered)

    @property
    def num_cached_tokens(self) -> int | None:
        """Prompt tokens found in the prefix cache, by each prompt's first sequence; None if an engine did not say."""
        counts = [choice.num_cached_tokens for choice in self._choices[:: self._n]]
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """What is ready, at each wake-up; ends when every choice has. Raises EngineLost and GenerationFailed."""
        async with aclosing(_arrivals(self._generations)) as arrivals:
            async for arrived in arrivals:
                touched = {}
                for prompt, deltas in arrived:
                    for delta in deltas:
                        choice = self._take(prompt, delta)
                        touched[id(choice)] = choice
                pieces = [piece for choice in touched.values() if (piece := choice.pop_piece()) is not None]
                if pieces:
                    yield pieces
                if all(choice.is_finished for choice in self._choices):
                    return

    def _take(self, prompt: int, delta: Delta) -> _Choice:
        generation, choice = self._generations[prompt], self._choices[prompt * self._n + delta.index]
        if choice.is_finished:
            generation.undelivered(len(delta.token_ids), "stop")
            return choice
        if delta.finish is not None and delta.finish.reason == "error":
            raise GenerationFailed(delta.finish.message or "the engine failed on this request")
        num_past_stop = choice.take(delta)
        if choice.has_stopped:
            generation.stop(delta.index)
            generation.undelivered(num_past_stop, "stop")
        return choice

    def deliver(self, pieces: Iterable[Piece]) -> None:
        """Count these pieces' tokens as delivered, and each request that ends with them as finished."""
        for piece in pieces:
            prompt = piece.choice // self._n
            generation = self._generations[prompt]
            generation.delivered(piece.num_tokens)
            self.num_completion_tokens += piece.num_tokens
            if piece.finish_reason is not None:
                self._num_undelivered[prompt] -= 1
                if not self._num_undelivered[prompt]:
                    generation.finish()

    async def committed(self) -> None:
        """Everything counted so far is durable: one commit serves the whole server."""
        await self._generations[0].committed()

    def close(self) -> None:
        """Ends what still runs; idempotent."""
        for generation in self._generations:
            generation.close()


async def _arrivals(generations: Sequence[Generation]) -> AsyncGenerator[list[tuple[int, Sequence[Delta]]], None]:
    """(prompt, deltas) of every generation that has some, together."""
    if len(generations) == 1:
        async for deltas in generations[0]:
            yield [(0, deltas)]
        return
    iterators = [aiter(generation) for generation in generations]
    waiting = {asyncio.ensure_future(_next(iterator)): prompt for prompt, iterator in enumerate(iterators)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            ready = []
            for task in done:
                prompt, arrived = waiting.pop(task), task.result()
                if arrived is not None:
                    ready.append((prompt, arrived))
                    waiting[asyncio.ensure_future(_next(iterators[prompt]))] = prompt
            if ready:
                yield sorted(ready, key=lambda pair: pair[0])
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def _next(iterator: AsyncIterator[Sequence[Delta]]) -> Sequence[Delta] | None:
    return await anext(iterator, None)
