"""Answers over real generations, without an engine: every token that arrives is settled, under the right reason."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.wire import Finish, Output, Start
from frontend.api.answer import Answer, Piece
from frontend.engines.generation import Generation, SequenceState
from frontend.errors import ApiError, EngineLost, GenerationFailed
from frontend.text.detokenizer import SequenceText, Stops, StopStrings
from tests.fakes import fake_asked, fake_finish, fake_group, fake_start
from tests.frontend.small_tokenizers import byte_level_tokenizer

TOKENIZER = byte_level_tokenizer()


class Books:
    """Takes the place of the record and of the engine's connection: sums what is counted and sent."""

    def __init__(self) -> None:
        self.tokens: Counter[str] = Counter()
        self.ended_sequences: Counter[str] = Counter()
        self.ended_requests: Counter[str] = Counter()
        self.aborted: list[int] = []
        self.num_prefill_tokens = 0

    def abort(self, request_ids: Sequence[int], reason: str) -> None:
        self.aborted += request_ids

    def forget(self, request_id: int) -> None: ...

    def submitted(self) -> None: ...

    def prefilling(self, num_prompt_tokens: int) -> None:
        self.num_prefill_tokens += num_prompt_tokens

    def first_token(self, seconds: float, origin: object) -> None: ...

    def request_first_token(self, seconds: float) -> None: ...

    def later_tokens(self, gap_s: float, num_tokens: int) -> None: ...

    def delivered(self, num_tokens: int) -> None:
        self.tokens["delivered"] += num_tokens

    def undelivered(self, num_tokens: int, reason: str) -> None:
        self.tokens[reason] += num_tokens

    def ended(self, reason: str) -> None:
        self.ended_sequences[reason] += 1

    def finished(self, sequence: Any) -> None: ...

    def gave_up(self, reason: str) -> None: ...

    def request_ended(self, request: Any) -> None:
        self.ended_requests[request.reason] += 1

    def request_gave_up(self, reason: str) -> None:
        self.ended_requests[reason] += 1


def output_of(sequence: SequenceState, tokens: list[int], finish: Finish | None, start: Start | None) -> Output:
    """Its next tokens."""
    return Output(sequence.request_id, sequence.num_tokens, tokens, None, finish, start)


class Run:
    """One request of n sequences, its books, and what its client saw."""

    def __init__(self, n: int, stops: Sequence[str] = ()) -> None:
        self.books = Books()
        self.num_received = 0
        group = fake_group(lambda: None)
        asked = fake_asked(n=n)
        books: Any = self.books
        self.generation = Generation(books, books, group, lambda: 1.0, asked, range(n))
        self.answer = Answer([self.generation], lambda: self._text(stops), n=n, num_prompt_tokens=1)
        self.pieces: list[Piece] = []

    @staticmethod
    def _text(stops: Sequence[str]) -> SequenceText:
        return SequenceText(TOKENIZER.detokenizer(), StopStrings(Stops(stops)))

    def send(self, index: int, tokens: list[int], reason: str | None = None) -> None:
        """What the engine's connection does with an output: an ended sequence's tokens are not its concern."""
        sequence = self.generation.sequences[index]
        if sequence.reason is not None:
            return
        self.num_received += len(tokens)
        finish = None if reason is None else fake_finish(reason, message="no room")
        start = fake_start() if sequence.num_tokens == 0 else None
        self.generation.on_output(sequence, output_of(sequence, tokens, finish, start), 1.0)

    async def read(self, leaves_after: int | None = None) -> None:
        """A client that reads to the end, or leaves after so many pieces."""
        news = asyncio.Event()
        self.answer.listen(news.set)
        try:
            while not self.answer.is_finished and (leaves_after is None or len(self.pieces) < leaves_after):
                await news.wait()
                news.clear()
                self.pieces += self.answer.deliver_ready()[0]
        finally:
            self.answer.close()


@given(
    steps=st.lists(st.tuples(st.integers(0, 2), st.lists(st.sampled_from([*b"ab.", 0xC3]), max_size=4)), max_size=12),
    reasons=st.tuples(*[st.sampled_from(["stop", "length", "error", "abort"])] * 3),
    batch=st.integers(1, 4),
    stops=st.sampled_from([(), (".",), ("ab", "b.")]),
    leaves_after=st.none() | st.integers(1, 5),
    is_lost=st.booleans(),
)
def test_every_token_is_settled_and_every_request_ends_once(
    steps: list[tuple[int, list[int]]],
    reasons: tuple[str, ...],
    batch: int,
    stops: tuple[str, ...],
    leaves_after: int | None,
    is_lost: bool,
):
    async def run() -> Run:
        made = Run(3, stops)
        reading = asyncio.create_task(made.read(leaves_after))
        for number, (index, tokens) in enumerate(steps):
            made.send(index, tokens)
            if number % batch == 0:
                await asyncio.sleep(0)
        if is_lost:
            made.generation.fail(EngineLost("gone"))
        else:
            for index, reason in enumerate(reasons):
                made.send(index, [ord("z")], reason)
        await asyncio.gather(reading, return_exceptions=True)
        if reading.exception() is not None:
            assert isinstance(reading.exception(), ApiError)
        return made

    made = asyncio.run(run())
    books = made.books
    assert sum(books.tokens.values()) == made.num_received
    assert books.tokens["delivered"] == made.answer.usage.num_completion
    assert books.ended_sequences.total() == 3
    assert books.ended_requests.total() == 1


async def test_a_client_that_leaves_is_an_abort_and_its_tokens_were_for_nobody():
    run = Run(1)
    run.send(0, list(b"a"))
    run.send(0, [0xC3])
    await run.read(leaves_after=1)
    assert run.books.tokens == {"delivered": 2}
    left = Run(1)
    left.send(0, list(b"abc"))
    left.answer.close()
    assert (left.books.tokens, left.books.aborted) == ({"disconnect": 3}, [0])
    assert left.books.ended_requests == run.books.ended_requests == {"abort": 1}


async def test_a_request_that_the_engine_gives_up_is_an_error():
    run = Run(2)
    run.send(1, list(b"ab"))
    run.send(0, list(b"c"), "error")
    with pytest.raises(GenerationFailed, match="no room"):
        await run.read()
    assert run.books.tokens == {"error": 3}
    assert run.books.ended_sequences == {"error": 1, "abort": 1}
    assert run.books.ended_requests == {"error": 1}


async def test_a_stop_string_counts_as_stop_however_the_engine_ended():
    run = Run(1, stops=["."])
    run.send(0, list(b"a.bc"), "length")
    await run.read()
    assert run.books.tokens == {"delivered": 2, "stop": 2}
    assert run.books.ended_requests == {"stop": 1}
    assert [(piece.text, piece.finish_reason) for piece in run.pieces] == [("a", "stop")]
