"""A ZeroMQ socket on the event loop: calls back with what arrives, sends without ever waiting.

No coroutine and no task: what arrives is handled in one synchronous callback, many messages at a time, so that it is
counted and committed before any request's coroutine runs. A turn of the event loop handles a bounded amount, once,
however often it is asked for: with more tokens under way than this process can deliver, it still answers scrapes and
accepts requests within a few turns.

NOTE: the descriptor of a ZeroMQ socket becomes readable when the socket's state may have changed, not while messages
wait, and a send may swallow that signal. So every wake-up reads until nothing is left, and every send looks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import zmq

# Some 4,700 tokens. Measured at 32, 64 and 128 KiB with messages always waiting: the longest scrape takes 36, 64 and 98
# ms, and 261,000, 286,000 and 303,000 tokens/s are written (tests/benchmarks/saturated.py).
MAX_BYTES_A_TURN = 65_536

Messages = list[list[bytes]]


class SocketReader:
    """Owns the socket and closes it. `on_messages` gets the parts of one or more messages."""

    def __init__(self, socket: zmq.Socket[bytes], on_messages: Callable[[Messages], None]) -> None:
        self._socket = socket
        self._on_messages = on_messages
        self._loop = asyncio.get_running_loop()
        self._fd = int(socket.getsockopt(zmq.FD))
        self._is_due = False
        self._loop.add_reader(self._fd, self._read_soon)
        self._read_soon()

    @property
    def is_closed(self) -> bool:
        return bool(self._socket.closed)

    def send(self, raw: bytes) -> bool:
        """Whether the message was taken; False when the socket is full or closed."""
        if self._socket.closed:
            return False
        try:
            self._socket.send(raw, zmq.NOBLOCK)
        except zmq.Again:
            return False
        self._events()
        return True

    def can_send(self) -> bool:
        """Whether at least one message would be taken now."""
        return not self._socket.closed and bool(self._events() & zmq.POLLOUT)

    def drain(self) -> None:
        """Hand over everything that can be read now."""
        while not self._socket.closed and self._read_some():
            pass

    def close(self) -> None:
        """Idempotent; what was not read is gone."""
        if not self._socket.closed:
            self._loop.remove_reader(self._fd)
            self._socket.close(linger=0)

    def _events(self) -> int:
        """Asking may swallow the descriptor's signal, as a send may: read soon what there is to read."""
        events = int(self._socket.getsockopt(zmq.EVENTS))
        if events & zmq.POLLIN:
            self._read_soon()
        return events

    def _read_soon(self) -> None:
        if not self._is_due:
            self._is_due = True
            self._loop.call_soon(self._read)

    def _read(self) -> None:
        self._is_due = False
        if not self._socket.closed and self._read_some():
            self._read_soon()

    def _read_some(self) -> bool:
        """Whether there may be more."""
        messages: Messages = []
        num_bytes = 0
        while num_bytes < MAX_BYTES_A_TURN:
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            messages.append(parts)
            num_bytes += sum(map(len, parts))
        if messages:
            self._on_messages(messages)
        return num_bytes >= MAX_BYTES_A_TURN
