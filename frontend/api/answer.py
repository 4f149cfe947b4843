"""One HTTP request's sequences, from the engine's tokens to pieces of text, and the account of every token.

A piece is what one turn adds to one choice; tokens whose text is still held back (half a character, the beginning of a
stop string or of a tool call) wait and come with the next piece. P4: whoever writes pieces first counts them as
delivered, has that committed (`frontend.counters.group_commit`), then writes; and calls `close` in a finally.
`frontend.api.delivery` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from engine.wire import Finish, TokenLogprobs
from frontend.engines import Delta
from frontend.errors import GenerationFailed
from frontend.parsing import Parser, Part, joined
from frontend.text import SequenceText


class TokenSource(Protocol):
    """One prompt's n sequences, as an answer needs them: `frontend.engines.Generation`."""

    def listen(self, on_news: Callable[[], None]) -> None: ...

    def take(self) -> Sequence[Delta]: ...

    def stop(self, index: int) -> None: ...

    def delivered(self, num_tokens: int) -> None: ...

    def undelivered(self, num_tokens: int, reason: str) -> None: ...

    def finish(self) -> None: ...

    def close(self) -> None: ...


class Usage(NamedTuple):
    """Tokens of a request; `num_cached` is None if an engine did not say."""

    num_prompt: int
    num_completion: int
    num_cached: int | None


@dataclass(frozen=True, slots=True)
class ShownToken:
    """A token with its log probabilities; `offset` counts the characters of the answer before it."""

    token_id: int
    offset: int
    logprobs: TokenLogprobs


@dataclass(slots=True)
class Piece:
    """What is new of one choice. Its words are `text`, or where a parser reads them `parts`. `tokens` is filled only
    where log probabilities were asked for."""

    choice: int
    text: str = ""
    num_tokens: int = 0
    tokens: list[ShownToken] = field(default_factory=list)
    finish_reason: str | None = None
    parts: list[Part] = field(default_factory=list)

    def extend(self, later: Piece) -> None:
        """Make this piece the two together."""
        self.text += later.text
        self.parts = joined(self.parts + later.parts)
        self.num_tokens += later.num_tokens
        self.tokens += later.tokens
        self.finish_reason = later.finish_reason


class _Choice:
    """One sequence: its text, and the piece that is being gathered."""

    __slots__ = (
        "_is_silent",
        "_parser",
        "_piece",
        "_shows_stop_token",
        "_text",
        "is_finished",
        "num_cached_tokens",
    )

    def __init__(
        self, number: int, text: SequenceText, parser: Parser | None, *, shows_stop_token: bool, is_silent: bool
    ) -> None:
        self._piece = Piece(number)
        self._text = text
        self._parser = parser
        self._shows_stop_token = shows_stop_token
        self._is_silent = is_silent
        self.is_finished = False
        self.num_cached_tokens: int | None = None  # known with the first token

    def take(self, delta: Delta) -> int:
        """Add the tokens; returns how many came after the answer's end."""
        if delta.start is not None:
            self.num_cached_tokens = delta.start.num_cached_tokens
        if self._is_silent:
            self._piece.finish_reason = "length"
            self.is_finished = True
            return len(delta.token_ids)
        if delta.finish is None and delta.logprobs is None and not self._text.is_searched:
            self._say(self._text.append_all(delta.token_ids))
            self._piece.num_tokens += len(delta.token_ids)
            return 0
        num_taken = self._take_each(delta)
        self._end(delta.finish)
        return len(delta.token_ids) - num_taken

    def _take_each(self, delta: Delta) -> int:
        """Token by token: to the one that completes a stop string, and with log probabilities."""
        num_shown = len(delta.token_ids) - self._num_hidden(delta)
        shown = []
        position = -1
        for position, token_id in enumerate(delta.token_ids):
            if delta.logprobs is not None:
                logprobs = delta.logprobs[position]
                self._piece.tokens.append(ShownToken(token_id, self._text.num_characters, logprobs))
            if position >= num_shown:
                self._text.append_unseen()
            else:
                shown.append(self._text.append(token_id))
            if self._text.has_stopped:
                break
        self._say("".join(shown))
        self._piece.num_tokens += position + 1
        return position + 1

    def _say(self, text: str) -> None:
        if self._parser is None:
            self._piece.text += text
        elif text:
            self._piece.parts += self._parser.feed(text)

    def _num_hidden(self, delta: Delta) -> int:
        """1 where the last token is the one that the engine stopped at: end of text, or one of `stop_token_ids`."""
        stopped = delta.finish is not None and delta.finish.reason == "stop"
        return int(stopped and not self._shows_stop_token and len(delta.token_ids) > 0)

    def _end(self, finish: Finish | None) -> None:
        if finish is not None:
            self._say(self._text.finish())
            self._piece.finish_reason = finish.reason
        if self._text.has_stopped:
            self._piece.finish_reason = "stop"
        self.is_finished = self._piece.finish_reason is not None
        if self.is_finished and self._parser is not None:
            self._piece.parts += self._parser.finish()

    @property
    def has_stopped(self) -> bool:
        """Whether a stop string ended it."""
        return self._text.has_stopped

    def pop_piece(self) -> Piece | None:
        """What can be shown now."""
        piece = self._piece
        if not (piece.text or piece.parts) and piece.finish_reason is None:
            return None
        self._piece = Piece(piece.choice)
        if piece.parts:
            piece.parts = joined(piece.parts)
        return piece


class Answer:
    """All choices of a request: prompt p's sequence i is choice p * n + i. A silent one has no tokens."""

    def __init__(
        self,
        generations: Sequence[TokenSource],
        new_text: Callable[[], SequenceText],
        *,
        n: int,
        num_prompt_tokens: int,
        new_parser: Callable[[], Parser] | None = None,
        shows_stop_token: bool = False,
        is_silent: bool = False,
    ) -> None:
        self._generations = generations
        self._num_prompt_tokens = num_prompt_tokens
        self._n = n
        numbers = range(len(generations) * n)
        choices = [
            _Choice(
                number,
                new_text(),
                None if new_parser is None else new_parser(),
                shows_stop_token=shows_stop_token,
                is_silent=is_silent,
            )
            for number in numbers
        ]
        self._choices = [choices[at : at + n] for at in range(0, len(choices), n)]  # of each generation
        self._num_undelivered = [n] * len(generations)  # choices of each prompt whose last piece is not delivered
        self._num_completion_tokens = 0

    @property
    def is_delivered(self) -> bool:
        """Whether every choice's last piece was delivered."""
        return not any(self._num_undelivered)

    @property
    def usage(self) -> Usage:
        """Up to now. Of prompt tokens found in the prefix cache each prompt's first sequence knows."""
        counts = [choices[0].num_cached_tokens for choices in self._choices]
        known = [count for count in counts if count is not None]
        num_cached = sum(known) if len(known) == len(counts) else None
        return Usage(self._num_prompt_tokens, self._num_completion_tokens, num_cached)

    @property
    def is_finished(self) -> bool:
        """Whether every choice's last piece was taken."""
        return all(choice.is_finished for choices in self._choices for choice in choices)

    def listen(self, on_news: Callable[[], None]) -> None:
        """It is called whenever there is something to take."""
        for generation in self._generations:
            generation.listen(on_news)

    def take(self) -> list[Piece]:
        """What has become ready. Raises EngineLost and GenerationFailed."""
        pieces = []
        for generation, choices in zip(self._generations, self._choices, strict=True):
            if deltas := generation.take():
                for delta in deltas:
                    self._take(generation, choices[delta.index], delta)
                pieces += [piece for choice in choices if (piece := choice.pop_piece()) is not None]
        return pieces

    def _take(self, generation: TokenSource, choice: _Choice, delta: Delta) -> None:
        if choice.is_finished:
            generation.undelivered(len(delta.token_ids), "stop")
            return
        if delta.finish is not None and delta.finish.reason == "error":
            raise GenerationFailed(delta.finish.message or "the engine failed on this request")
        num_past_end = choice.take(delta)
        if choice.has_stopped:
            generation.stop(delta.index)
        if num_past_end:
            generation.undelivered(num_past_end, "stop")

    def deliver_ready(self) -> tuple[list[Piece], bool]:
        """`take`, and `deliver` all of it. Whether these are the answer's last pieces."""
        pieces = self.take()
        self.deliver(pieces)
        return pieces, self.is_delivered

    def deliver(self, pieces: Iterable[Piece]) -> None:
        """Count these pieces' tokens as delivered, and each prompt whose choices end with them as finished."""
        for piece in pieces:
            prompt = piece.choice // self._n
            generation = self._generations[prompt]
            generation.delivered(piece.num_tokens)
            self._num_completion_tokens += piece.num_tokens
            if piece.finish_reason is not None:
                self._num_undelivered[prompt] -= 1
                if not self._num_undelivered[prompt]:
                    generation.finish()

    def close(self) -> None:
        """Ends what still runs; idempotent."""
        for generation in self._generations:
            generation.close()
