"""One API server asks another for the snapshots it holds: in one question a turn, without waiting, bounded."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tempfile
from collections.abc import Iterator
from typing import Any

import msgpack
import pytest

from frontend import held_snapshots
from frontend.held_snapshots import MAX_OUTSTANDING, Held, HeldSnapshots, Questions, held_path

ANSWER = (0.5, b"snapshot")


@pytest.fixture
def directory() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="wb") as directory:
        yield directory


class Asked:
    """API server 3, which holds engine 0's snapshot, and counts what it was sent."""

    def __init__(self, directory: str) -> None:
        self.engines: list[Any] = []
        self.server = HeldSnapshots(directory, 3, self._held)

    def _held(self, engine: Any) -> Held | None:
        self.engines.append(engine)
        return ANSWER if engine == 0 else None


async def answers(*futures: asyncio.Future[Held | None]) -> list[Held | None]:
    async with asyncio.timeout(10):
        return await asyncio.gather(*futures)


async def test_what_is_asked_in_one_turn_is_one_question(directory: str, monkeypatch: pytest.MonkeyPatch):
    sent = []
    send = held_snapshots._Connection.send
    monkeypatch.setattr(held_snapshots._Connection, "send", lambda c, m: (sent.append(m), send(c, m)))
    asked, questions = Asked(directory), Questions(directory)
    await asked.server._starting
    assert await answers(questions.ask(3, 0)) == [ANSWER]
    assert await answers(*(questions.ask(3, engine) for engine in (0, 1, 0))) == [ANSWER, None, ANSWER]
    assert asked.engines == [0, 0, 1, 0]
    assert [message for message in sent if type(message[1][0]) is int] == [[1, [0]], [2, [0, 1, 0]]]
    questions.close()
    asked.server.close()


async def test_who_is_not_there_or_goes_has_nothing_and_its_successor_is_asked(directory: str):
    questions = Questions(directory)
    assert await answers(questions.ask(3, 0)) == [None]
    for _ in range(2):
        asked = Asked(directory)
        await asked.server._starting
        assert await answers(questions.ask(3, 0)) == [ANSWER]
        asked.server.close()
        await asyncio.sleep(0.05)
    assert await answers(questions.ask(3, 0)) == [None]
    questions.close()


async def test_questions_to_one_that_does_not_answer_are_bounded_and_end_with_it(directory: str):
    questions = Questions(directory)
    with socket.socket(socket.AF_UNIX) as frozen:
        frozen.bind(held_path(directory, 3))
        frozen.listen()
        waiting = []
        for _ in range(MAX_OUTSTANDING):
            waiting.append(questions.ask(3, 0))
            await asyncio.sleep(0.001)
        assert await answers(questions.ask(3, 0)) == [None]
        assert not any(one.done() for one in waiting)
    assert await answers(*waiting) == [None] * MAX_OUTSTANDING
    questions.close()


@pytest.mark.parametrize("raw", [b"\xc1", msgpack.packb(7), msgpack.packb([1]), msgpack.packb([1, 2])])
async def test_what_is_no_question_ends_the_connection_and_nothing_else(directory: str, raw: bytes):
    asked, questions = Asked(directory), Questions(directory)
    await asked.server._starting
    reader, writer = await asyncio.open_unix_connection(held_path(directory, 3))
    writer.write(raw)
    async with asyncio.timeout(10):
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
    writer.close()
    assert await answers(questions.ask(3, 0)) == [ANSWER]
    questions.close()
    asked.server.close()


@pytest.mark.parametrize("answer", [7, [1], [2, []], [1, [7]], [1, [[0.5, "text"]]], [1, [[1, b""]]]])
async def test_what_is_no_answer_ends_the_connection(directory: str, answer: Any):
    ended = asyncio.Event()

    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(msgpack.packb(answer))
        await reader.read()
        ended.set()
        writer.close()

    server = await asyncio.start_unix_server(babble, held_path(directory, 3))
    questions = Questions(directory)
    question = questions.ask(3, 0)
    async with asyncio.timeout(10):
        await ended.wait()
    assert not question.done() or question.result() is None
    questions.close()
    server.close()
