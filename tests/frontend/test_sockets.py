"""A ZeroMQ socket on the event loop: everything comes, in order, a bounded part of it in each turn of the loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import zmq

from frontend import sockets
from frontend.sockets import Messages, SocketReader
from tests.contexts import OwningContext
from tests.frontend.deployments import until


@pytest.fixture
def pair() -> Iterator[tuple[zmq.Socket[bytes], zmq.Socket[bytes]]]:
    """Two ends of one connection, in this process."""
    context = OwningContext()
    ours, theirs = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    ours.bind("inproc://pair")
    theirs.connect("inproc://pair")
    yield ours, theirs
    context.destroy(linger=0)


class Turns:
    """Counts the turns of the event loop, and asks for `reader` in each as often as many senders would."""

    def __init__(self) -> None:
        self.number = 0
        self.reader: SocketReader | None = None

    def __call__(self) -> None:
        self.number += 1
        if self.reader is not None and not self.reader.is_closed:
            for _ in range(20):
                self.reader.can_send()
        asyncio.get_running_loop().call_soon(self)


async def test_a_turn_hands_over_a_bounded_part_and_only_once_however_many_ask(
    pair: tuple[zmq.Socket[bytes], zmq.Socket[bytes]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sockets, "MAX_BYTES_A_TURN", 4000)
    ours, theirs = pair
    sent = [b"%03d" % number * 400 for number in range(200)]
    for message in sent:
        theirs.send(message)
    turns = Turns()
    handed_over: list[tuple[int, Messages]] = []
    turns.reader = SocketReader(ours, lambda messages: handed_over.append((turns.number, messages)))
    turns()
    await until(lambda: sum(len(messages) for _, messages in handed_over) == len(sent))
    turns.reader.close()
    assert [message for _, messages in handed_over for (message,) in messages] == sent
    assert {len(messages) for _, messages in handed_over} == {4}
    numbers = [number for number, _ in handed_over]
    assert len(set(numbers)) == len(numbers)


async def test_a_message_over_the_bound_comes_alone(pair: tuple[zmq.Socket[bytes], zmq.Socket[bytes]]):
    ours, theirs = pair
    large = bytes(2 * sockets.MAX_BYTES_A_TURN)
    for message in (large, b"small", b"small"):
        theirs.send(message)
    handed_over: list[Messages] = []
    reader = SocketReader(ours, handed_over.append)
    await until(lambda: len(handed_over) == 2)
    reader.close()
    assert handed_over == [[[large]], [[b"small"], [b"small"]]]


async def test_what_is_drained_comes_at_once_and_whole(pair: tuple[zmq.Socket[bytes], zmq.Socket[bytes]]):
    ours, theirs = pair
    message = bytes(sockets.MAX_BYTES_A_TURN)
    for _ in range(3):
        theirs.send(message)
    handed_over: list[Messages] = []
    reader = SocketReader(ours, handed_over.append)
    reader.drain()
    reader.close()
    assert handed_over == [[[message]]] * 3
