"""How many connections there are, how long they may wait, and what is answered where no request can be read: over real
sockets, with the public application behind."""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from frontend.app import public_app
from frontend.connections import Connections, Listener, connection_limit
from tests.frontend.deployments import Node, engine_of, one, total


class Closable:
    def __init__(self) -> None:
        self.is_closed = False

    def abort(self) -> None:
        self.is_closed = True


def opened(connections: Connections, number: int) -> list[Closable]:
    made = [Closable() for _ in range(number)]
    for one_of_them in made:
        assert connections.has_room()
        connections.opened(one_of_them)
    return made


def test_for_one_connection_too_many_the_one_that_has_waited_longest_is_closed():
    connections = Connections(3)
    first, second, third = opened(connections, 3)
    with connections.at_work(first):
        assert connections.has_room()
        connections.opened(Closable())
        assert [c.is_closed for c in (first, second, third)] == [False, True, False]
    opened(connections, 1)
    assert [c.is_closed for c in (first, third)] == [False, True]
    assert len(connections) == 3


def test_there_is_no_room_while_all_are_at_work():
    connections = Connections(1)
    (only,) = opened(connections, 1)
    with connections.at_work(only):
        assert not connections.has_room()
    connections.closed(only)
    connections.closed(only)
    assert len(opened(connections, 1)) == len(connections) == 1


def test_a_connection_that_is_closed_at_work_waits_no_more():
    connections = Connections(1)
    (only,) = opened(connections, 1)
    with connections.at_work(only):
        connections.closed(only)
    (other,) = opened(connections, 1)
    assert connections.has_room()
    assert (only.is_closed, other.is_closed) == (False, True)


# --- over sockets ---


class Client:
    """One connection, of which everything that comes is kept."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def says(self, raw: bytes) -> None:
        self.writer.write(raw)
        await self.writer.drain()

    async def hears(self) -> tuple[int, dict[str, str], Any]:
        """(status, headers, JSON) of the next answer."""
        async with asyncio.timeout(30):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
            body = await self.reader.readexactly(int(headers["content-length"]))
        return int(head[0].split()[1]), headers, json.loads(body)

    async def end(self) -> bytes:
        """What still came before the other side closed."""
        async with asyncio.timeout(30):
            try:
                return await self.reader.read()
            except ConnectionResetError:
                return b""


Connect = Callable[[], Any]


@asynccontextmanager
async def listening(node: Node) -> AsyncIterator[Connect]:
    """What opens connections to the node's public application, as the process serves it."""
    state, sock = node.state, socket.create_server(("127.0.0.1", 0))
    address = sock.getsockname()
    listener = Listener(public_app(state), state.connections, state.config.http.head_timeout_s, state.refused)
    await listener.start(sock.detach())
    async with AsyncExitStack() as stack:
        stack.push_async_callback(listener.close)

        async def connect() -> Client:
            client = Client(*await asyncio.open_connection(*address))
            stack.callback(client.writer.close)
            return client

        yield connect


GET = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
BODY = b'{"prompt": [1, 2, 3], "max_tokens": 4}'


async def test_connections_that_send_no_whole_head_are_closed_by_a_deadline(deploy: Any):
    node = await one(deploy, head_timeout_s=0.3)
    async with listening(node) as connect:
        clients = [await connect() for _ in range(200)]
        for number, client in enumerate(clients):
            await client.says(b"" if number % 2 else b"G")
        assert {await client.end() for client in clients} == {b""}
    assert len(node.state.connections) == 0


async def test_a_head_that_comes_byte_by_byte_is_not_waited_for(deploy: Any):
    node = await one(deploy, head_timeout_s=0.3)
    async with listening(node) as connect:
        client = await connect()
        await client.says(b"GET /")
        ending = asyncio.create_task(client.end())
        while not ending.done():
            client.writer.write(b"a")
            await asyncio.sleep(0.01)
        assert await ending == b""


async def test_a_connection_that_asks_again_stays_open_and_an_idle_one_is_closed(deploy: Any):
    node = await one(deploy, head_timeout_s=0.5)
    async with listening(node) as connect:
        client = await connect()
        for _ in range(4):
            await client.says(GET)
            assert (await client.hears())[0] == 200
        assert await client.end() == b""


async def test_a_body_that_does_not_come_in_time_gets_a_408_and_is_counted(deploy: Any):
    node = await one(deploy, body_timeout_s=0.2)
    async with listening(node) as connect:
        client = await connect()
        await client.says(POST % (len(BODY), BODY[:-1]))
        status, headers, body = await client.hears()
        assert (status, headers["connection"]) == (408, "close")
        assert set(body["error"]) == {"message", "type", "param", "code"}
        samples = await node.scrape()
    assert total(samples, "http_requests_total", handler="/v1/completions", status="4xx") == 1


async def test_a_body_in_chunks_that_are_none_is_a_body_that_does_not_come(deploy: Any):
    node = await one(deploy, body_timeout_s=0.2)
    async with listening(node) as connect:
        client = await connect()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        await client.says(head + b"Transfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n")
        assert b"100 Continue" in await client.reader.readuntil(b"\r\n\r\n")
        await client.says(b"5\r\n{    \r\nno chunk\r\n")
        status, _, body = await client.hears()
    assert (status, body["error"]["type"]) == (408, "invalid_request_error")


NO_HTTP = {
    "a header that no header can be": b"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer a-secret\0\r\n\r\n",
    "a header that is too long": b"GET / HTTP/1.1\r\nHost: x\r\nCookie: a-secret" + b"x" * 20_000 + b"\r\n\r\n",
    "a path that is too long": b"GET /" + b"a-secret" * 2000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "too many headers": b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a: a-secret\r\n" * 200 + b"\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "a method that is none": b"A-SECRET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a length that is none": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: a-secret\r\n\r\n",
    "a version that is none": b"GET / HTTP/9.9\r\nHost: a-secret\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "an Expect that is no text": GET.replace(b"Host: x", b"Host: x\r\nExpect: \x82"),
    "an unknown Expect": POST.replace(b"Host: x", b"Host: x\r\nExpect: a-secret") % (2, b"{}"),
}


@pytest.mark.parametrize("case", NO_HTTP)
async def test_what_is_no_request_gets_a_4xx_in_the_one_shape_and_is_counted_once(deploy: Any, caplog, case: str):
    node = await one(deploy)
    async with listening(node) as connect:
        for _ in range(3):
            client = await connect()
            await client.says(NO_HTTP[case])
            status, _, body = await client.hears()
            assert 400 <= status < 500
            assert set(body["error"]) == {"message", "type", "param", "code"}
            assert body["error"]["type"] == "invalid_request_error"
        samples = await node.scrape()
    assert total(samples, "http_requests_total", method="other", handler="none", status="4xx") == 3
    said = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) <= 1
    assert all("a-secret" not in record.getMessage() and record.exc_info is None for record in said)


async def test_a_cookie_of_nine_kilobytes_passes(deploy: Any):
    node = await one(deploy)
    async with listening(node) as connect:
        client = await connect()
        await client.says(GET.replace(b"Host: x", b"Host: x\r\nCookie: a=" + b"a" * 9000))
        assert (await client.hears())[0] == 200


async def test_an_upgrade_to_http_2_is_answered_as_http_1(deploy: Any):
    node = await one(deploy)
    async with listening(node) as connect:
        client = await connect()
        upgrade = b"Host: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk"
        await client.says(GET.replace(b"Host: x", upgrade))
        assert (await client.hears())[0] == 200
        await client.says(POST.replace(b"Host: x", upgrade) % (2, b"{}"))
        assert (await client.hears())[0] == 400


async def test_a_client_with_many_connections_that_ask_nothing_locks_nobody_out(deploy: Any):
    node = await one(deploy, max_connections=5)
    async with listening(node) as connect:
        idle = [await connect() for _ in range(20)]
        for client in idle:
            await client.says(b"GET ")
        other = await connect()
        await other.says(GET)
        assert (await other.hears())[0] == 200
        assert len(node.state.connections) == 5
        assert {await client.end() for client in idle[:15]} == {b""}


async def test_where_every_connection_is_at_work_one_more_gets_a_503_that_is_counted(deploy: Any):
    node = await one(deploy, max_connections=1)
    async with listening(node) as connect, engine_of(node) as engine:
        busy = await connect()
        await busy.says(POST % (len(BODY), BODY))
        await engine.receive_submits(1)
        refused = await connect()
        await refused.says(GET)
        status, headers, body = await refused.hears()
        assert (status, headers["retry-after"]) == (503, "1")
        assert body["error"]["code"] == "too_many_connections"
        assert await refused.end() == b""
        busy.writer.close()
        samples = await node.scrape()
    assert total(samples, "http_requests_total", method="other", handler="none", status="5xx") == 1


async def test_a_refused_client_that_says_nothing_is_closed(deploy: Any):
    node = await one(deploy, max_connections=1)
    async with listening(node) as connect, engine_of(node) as engine:
        busy = await connect()
        await busy.says(POST % (len(BODY), BODY))
        await engine.receive_submits(1)
        refused = await connect()
        assert (await refused.hears())[0] == 503
        assert await refused.end() == b""


def test_the_limit_leaves_descriptors_for_all_else(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1000, 1000))
    assert connection_limit(4096) == 750
    assert connection_limit(10) == 10
