"""How words reach a client: counted and committed first, straight to its sink, and no further than it reads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from frontend.api.answer import Answer
from frontend.api.delivery import Delivery
from frontend.counters.group_commit import GroupCommit
from frontend.engines.generation import Generation
from frontend.errors import EngineLost
from frontend.text.detokenizer import SequenceText, Stops, StopStrings
from tests.fakes import fake_asked, fake_finish, fake_group, fake_start
from tests.frontend.api.test_answer import Books, output_of
from tests.frontend.small_tokenizers import byte_level_tokenizer

TOKENIZER = byte_level_tokenizer()


class Client:
    """One stream: what it was told, in a log that a group commit shares."""

    def __init__(self, group: GroupCommit, log: list[str], name: str = "") -> None:
        self.books = Books()
        asked = fake_asked(n=1)
        books = self.books
        self.generation = Generation(books, books, group, lambda: 1.0, asked, [0])  # type: ignore[arg-type]
        text = SequenceText(TOKENIZER.detokenizer(), StopStrings(Stops([])))
        self.answer = Answer([self.generation], lambda: text, n=1, num_prompt_tokens=1)
        self.log = log
        self.name = name
        self.takes_more = True
        self.fault: Exception | None = None
        self.sink_fault: Exception | None = None
        self.delivery = Delivery(self.answer, group, self._say)

    def arrive(self, text: str, reason: str | None = None) -> None:
        sequence = self.generation.sequences[0]
        start = fake_start() if sequence.num_tokens == 0 else None
        finish = None if reason is None else fake_finish(reason)
        self.generation.on_output(sequence, output_of(sequence, list(text.encode()), finish, start), 1.0)

    def sink(self, words: str) -> bool:
        if self.sink_fault is not None:
            raise self.sink_fault
        self.log.append(f"{self.name}write {words}")
        return self.takes_more

    def _say(self) -> tuple[str, bool]:
        if self.fault is not None:
            raise self.fault
        pieces, are_last = self.answer.deliver_ready()
        words = "".join(piece.text for piece in pieces)
        self.log.append(f"{self.name}count {words}")
        return words, are_last


def make(num: int = 1) -> tuple[list[Client], list[str]]:
    log: list[str] = []
    group = fake_group(lambda: log.append("commit"))
    return [Client(group, log, str(number) if num > 1 else "") for number in range(num)], log


async def asleep(client: Client, sink: Callable[[str], bool] | None) -> asyncio.Task[str]:
    task = asyncio.create_task(client.delivery.next(sink))
    await asyncio.sleep(0)
    return task


async def test_words_go_to_the_sink_and_wake_nobody_but_for_the_last():
    (client,), log = make()
    waiting = await asleep(client, client.sink)
    for text in "ab":
        client.arrive(text)
        await asyncio.sleep(0)
        assert not waiting.done()
    client.arrive("c", "length")
    assert await waiting == "c"
    assert log == ["count a", "commit", "write a", "count b", "commit", "write b", "count c", "commit"]


async def test_one_commit_serves_all_that_arrives_together():
    clients, log = make(3)
    for client in clients:
        await asleep(client, client.sink)
    for client in clients:
        client.arrive("a")
        client.arrive("b")
    await asyncio.sleep(0)
    assert log == ["0count ab", "1count ab", "2count ab", "commit", "0write ab", "1write ab", "2write ab"]


async def test_a_full_sink_wakes_the_coroutine_and_nothing_is_taken_until_it_sleeps_again():
    (client,), log = make()
    client.takes_more = False
    waiting = await asleep(client, client.sink)
    client.arrive("a")
    assert await waiting == ""
    for text in "bc":
        client.arrive(text)
        await asyncio.sleep(0)
    assert client.books.tokens == {"delivered": 1}
    client.takes_more = True
    again = await asleep(client, client.sink)
    await asyncio.sleep(0)
    assert log[-1] == "write bc"
    assert not again.done()
    assert client.books.tokens == {"delivered": 3}
    again.cancel()


async def test_what_came_before_anybody_slept_is_handed_over():
    (client,), _ = make()
    client.arrive("a")
    await asyncio.sleep(0)
    assert await client.delivery.next() == "a"


async def test_an_engine_lost_is_raised_after_the_words_that_came_before_it():
    (client,), log = make()
    waiting = await asleep(client, client.sink)
    client.arrive("a")
    client.generation.fail(EngineLost("gone"))
    with pytest.raises(EngineLost):
        await waiting
    assert "write a" in log


async def test_a_fault_of_one_answer_is_its_own():
    clients, log = make(3)
    waiting = [await asleep(client, client.sink) for client in clients]
    clients[0].fault = RuntimeError("say")
    clients[1].sink_fault = OSError("write")
    for client in clients:
        client.arrive("a")
    with pytest.raises(RuntimeError):
        await waiting[0]
    with pytest.raises(OSError, match="write"):
        await waiting[1]
    assert log[-1] == "2write a"
    assert not waiting[2].done()
    waiting[2].cancel()


async def test_a_request_that_is_cancelled_takes_and_writes_nothing_more():
    (client,), log = make()
    waiting = await asleep(client, client.sink)
    client.arrive("a")
    waiting.cancel()
    await asyncio.sleep(0.01)
    client.answer.close()
    assert client.books.tokens == {"disconnect": 1}
    assert not any(line.startswith("write") for line in log)
