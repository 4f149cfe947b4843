"""Snapshots held by one API server and asked for by another, over a Unix socket in the deployment's directory.

An exporter answers for the engines it exports; who answers a scrape asks it. Not HTTP: with 8 engines that cost 1.2 ms
of a scrape, this 0.4 (measured). MessagePack both ways, on one connection from each that asks to each that is asked:

    question  [number, [engine, …]]
    answer    [number, [[lease_s, snapshot] or nil, …]]    lease_s: how much longer the snapshot may be passed on

All that is asked of one API server in one turn of the event loop is one question. Nothing waits here and nothing is
tried again: who asks has a deadline. A connection that brings anything else is closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final, cast

import msgpack

from metrics.deployment import API_SERVER
from metrics.snapshot import MAX_SNAPSHOT_BYTES

MAX_OUTSTANDING: Final = 64  # questions to a frozen API server (P9); it is killed, or answers them, in seconds
MAX_BUFFER_BYTES: Final = 16 * MAX_SNAPSHOT_BYTES

Held = tuple[float, bytes]  # (seconds that it may still be passed on, the encoded snapshot)


def held_path(directory: str, api_server: int) -> str:
    """The socket of one API-server index, whichever its incarnation."""
    return f"{directory}/{API_SERVER}-{api_server}.held"


class _Connection(asyncio.Protocol):
    """MessagePack both ways; `on_message` raises ValueError for what should not have come."""

    def __init__(self, on_message: Callable[[_Connection, Any], None], on_lost: Callable[[_Connection], None]) -> None:
        self._on_message = on_message
        self._on_lost = on_lost
        self._unpacker = msgpack.Unpacker(max_buffer_size=MAX_BUFFER_BYTES)
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are no instances of it

    def data_received(self, data: bytes) -> None:
        try:
            self._unpacker.feed(data)
            for message in self._unpacker:
                self._on_message(self, message)
        except (ValueError, msgpack.UnpackException):
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        self._on_lost(self)

    def send(self, message: list[Any]) -> None:
        self._transport.write(msgpack.packb(message))

    def close(self) -> None:
        self._transport.abort()


class HeldSnapshots:
    """The side that is asked. `held` says what this process may pass on of an engine at this instant."""

    def __init__(self, directory: str, api_server: int, held: Callable[[Any], Held | None]) -> None:
        self._path = held_path(directory, api_server)
        self._held = held
        self._connections: set[_Connection] = set()
        self._server: asyncio.Server | None = None
        self._starting = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(self._accept, self._path)  # in place of its predecessor's

    def _accept(self) -> _Connection:
        connection = _Connection(self._on_question, self._connections.discard)
        self._connections.add(connection)
        return connection

    def _on_question(self, connection: _Connection, question: Any) -> None:
        match question:
            case [int(number), [*engines]]:
                connection.send([number, [self._held(engine) for engine in engines]])
            case _:
                raise ValueError("no question")

    def close(self) -> None:
        self._starting.cancel()
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.close()


class Questions:
    """The side that asks: one connection to each API server that was asked anything, kept."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._asked: dict[int, _Asked] = {}

    def ask(self, api_server: int, engine: int) -> asyncio.Future[Held | None]:
        """None: it has none, or cannot be asked. There may never be an answer."""
        if api_server not in self._asked:
            self._asked[api_server] = _Asked(held_path(self._directory, api_server))
        return self._asked[api_server].ask(engine)

    def close(self) -> None:
        for asked in self._asked.values():
            asked.close()


class _Asked:
    """One API server that is asked."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._loop = asyncio.get_running_loop()
        self._number = 0
        self._collected: list[tuple[int, asyncio.Future[Held | None]]] = []  # to be the next question
        self._outstanding: dict[int, list[asyncio.Future[Held | None]]] = {}  # by its number
        self._connection: _Connection | None = None
        self._connecting: asyncio.Task[None] | None = None

    def ask(self, engine: int) -> asyncio.Future[Held | None]:
        if not self._collected:
            self._loop.call_soon(self._send)
        future: asyncio.Future[Held | None] = self._loop.create_future()
        self._collected.append((engine, future))
        return future

    def close(self) -> None:
        if self._connecting is not None:
            self._connecting.cancel()
        if self._connection is not None:
            self._connection.close()

    def _send(self) -> None:
        if not self._collected:
            return
        if self._connection is None:
            self._connecting = self._connecting or self._loop.create_task(self._connect())
            return
        collected, self._collected = self._collected, []
        futures = [future for _, future in collected]
        if len(self._outstanding) >= MAX_OUTSTANDING:
            _resolve(futures, [None] * len(futures))
        else:
            self._number += 1
            self._outstanding[self._number] = futures
            self._connection.send([self._number, [engine for engine, _ in collected]])

    async def _connect(self) -> None:
        try:
            _, self._connection = await self._loop.create_unix_connection(
                lambda: _Connection(self._on_answer, self._on_lost), self._path
            )
        except OSError:
            self._give_up()
        finally:
            self._connecting = None
        self._send()

    def _on_answer(self, connection: _Connection, answer: Any) -> None:
        match answer:
            case [int(number), [*found]] if number in self._outstanding:
                _resolve(self._outstanding.pop(number), [_checked(one) for one in found])
            case _:
                raise ValueError("no answer")

    def _on_lost(self, connection: _Connection) -> None:
        self._connection = None
        self._give_up()

    def _give_up(self) -> None:
        futures = [future for _, future in self._collected]
        futures += [future for question in self._outstanding.values() for future in question]
        self._collected, self._outstanding = [], {}
        _resolve(futures, [None] * len(futures))


def _checked(found: Any) -> Held | None:
    match found:
        case None:
            return None
        case [float(lease_s), bytes(raw)]:
            return lease_s, raw
        case _:
            raise ValueError("no snapshot")


def _resolve(futures: list[asyncio.Future[Held | None]], found: list[Held | None]) -> None:
    for future, one in zip(futures, found, strict=True):  # ValueError: not as many as were asked for
        if not future.done():
            future.set_result(one)
