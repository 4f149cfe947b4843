"""The connections of a listening socket: how many there are, how long each may take to ask, and what is answered where
no request can be read.

A connection *waits* until a whole request has come: the head within one time, which also ends an idle connection, the
body within another. So many connections are open at most: for one more, the one that has waited longest is closed, so
that whoever opens many and asks nothing locks nobody out. Where none waits, the new one gets a 503.

`Upgrade` is not followed (h2c, WebSocket): the request is answered as HTTP/1.1, which RFC 9110, 7.8, asks for.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import resource
import socket
from collections.abc import Awaitable, Callable, Iterator
from http import HTTPStatus
from typing import Any, Final, Protocol

from aiohttp import web
from aiohttp.http_exceptions import LineTooLong

from frontend.errors import (
    ApiError,
    BadRequest,
    EngineUnavailable,
    ExpectationFailed,
    HeadTooLarge,
    RequestTimeout,
    error_body,
    error_response,
)
from metrics.bulkhead import FaultLog

log = logging.getLogger(__name__)

BACKLOG: Final = 1024
CANCEL_S: Final = 2.0  # for requests that are cut off at the end
MAX_FIELD_BYTES: Final = 16_384  # one header: a cookie or a token may be long
MAX_FIELDS: Final = 64
LINGER_S: Final = 1.0  # for a refused client to say what it wants: closed sooner, it may see a reset and no answer

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Handle = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
OnRefused = Callable[[int], None]  # is told the status of an answer to what is no request


class _Closable(Protocol):
    def abort(self) -> None: ...


class Connections:
    """Which are open, and which of them wait, in the order in which they began to. Pure."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open: set[Any] = set()
        self._waiting: dict[Any, None] = {}

    def __len__(self) -> int:
        return len(self._open)

    def has_room(self) -> bool:
        """Whether one more may be opened; for it, one that waits may be closed."""
        if len(self._open) < self._limit:
            return True
        longest: _Closable | None = next(iter(self._waiting), None)
        if longest is None:
            return False
        self.closed(longest)
        longest.abort()
        return True

    def opened(self, connection: _Closable) -> None:
        self._open.add(connection)
        self._waiting[connection] = None

    def closed(self, connection: _Closable) -> None:
        """Idempotent."""
        self._open.discard(connection)
        self._waiting.pop(connection, None)

    @contextlib.contextmanager
    def at_work(self, connection: Any) -> Iterator[None]:
        """While a request of this connection is answered."""
        self._waiting.pop(connection, None)
        try:
            yield
        finally:
            if connection in self._open:
                self._waiting[connection] = None


def connection_limit(wanted: int) -> int:
    """As many as the operator wants, within the descriptors that this process may open; it needs some beside."""
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(1, min(wanted, descriptors * 3 // 4))


def receiving(connections: Connections, body_timeout_s: float) -> Any:
    """The innermost middleware: the handler begins when the request is whole."""

    @web.middleware
    async def receive(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.method == "POST":
            try:
                async with asyncio.timeout(body_timeout_s):
                    await request.read()  # which keeps it for the handler
            except TimeoutError:
                raise RequestTimeout(f"the request's body did not come within {body_timeout_s:g} s") from None
        with connections.at_work(request.protocol):
            return await handler(request)

    return receive


class Listener:
    """Serves an application on a listening socket."""

    def __init__(
        self, app: web.Application, connections: Connections, head_timeout_s: float, on_refused: OnRefused
    ) -> None:
        # handler_cancellation: a client that has gone cancels its handler, which aborts its sequences.
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=CANCEL_S, handle_signals=False)
        self._connections = connections
        self._head_timeout_s = head_timeout_s
        self._on_refused = on_refused
        self._http_log = logging.Logger("frontend.connections.http")
        self._http_log.addFilter(_WithoutContents())
        self._listening: asyncio.Server | None = None

    async def start(self, descriptor: int) -> None:
        """Accept from the inherited socket, which it takes over."""
        await self._runner.setup()
        server = self._runner.server
        assert server is not None, "a runner that is set up has a server"
        server.request_handler = self._expecting_only(server.request_handler)
        listening = socket.socket(fileno=descriptor)
        listening.setblocking(False)
        loop = asyncio.get_running_loop()
        self._listening = await loop.create_server(self._accept, sock=listening, backlog=BACKLOG)

    def stop(self) -> None:
        """Accept no more; idempotent."""
        if self._listening is not None:
            self._listening.close()

    async def close(self) -> None:
        """Give requests that are under way a moment, then close every connection."""
        self.stop()
        await self._runner.cleanup()

    def _expecting_only(self, handle: Handle) -> Handle:
        """Refuses what else a request may expect than `100-continue`, in the one shape; the library would do so before
        it calls any middleware, and fails where the header is no text."""

        async def checked(request: web.BaseRequest) -> web.StreamResponse:
            if request.headers.get("Expect", "100-continue").lower() == "100-continue":
                return await handle(request)
            self._on_refused(ExpectationFailed.status)
            return error_response(ExpectationFailed("only 100-continue can be expected"))

        return checked

    def _accept(self) -> asyncio.Protocol:
        if not self._connections.has_room():
            self._on_refused(EngineUnavailable.status)
            return _Refusal()
        server = self._runner.server
        assert server is not None, "a runner is set up before it listens"
        return Connection(server, self._connections, self._head_timeout_s, self._on_refused, self._http_log)


class Connection(web.RequestHandler):
    """One client's, with HTTP/1 on it."""

    __slots__ = ("_connections", "_on_refused")

    def __init__(
        self,
        server: web.Server,
        connections: Connections,
        head_timeout_s: float,
        on_refused: OnRefused,
        http_log: logging.Logger,
    ) -> None:
        # keepalive_timeout runs from the beginning, too, and from answer to answer: no byte but a whole head stops it.
        # auto_decompress: a body of 1 MB that holds 1 GB would stop the event loop for seconds, read or not.
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=head_timeout_s,
            max_field_size=MAX_FIELD_BYTES,
            max_headers=MAX_FIELDS,
            auto_decompress=False,
            access_log=None,  # type: ignore[arg-type]
            logger=http_log,
        )
        self._connections = connections
        self._on_refused = on_refused

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._connections.opened(self)
        super().connection_made(transport)

    def connection_lost(self, error: BaseException | None) -> None:
        self._connections.closed(self)
        super().connection_lost(error)

    def abort(self) -> None:
        """Let go of the connection, whatever is under way on it."""
        if self.transport is not None:
            self.transport.abort()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answers what could not be read as a request, and what its handler could not answer."""
        self.log_exception("not answered by a handler", exc_info=exc)
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun, there can be no other")
        if status >= 500:
            return _closing(error_response(ApiError("internal error", code="internal_error")))
        self._on_refused(status)
        # What the library says begins with the kind, and goes on with what was sent.
        what = f"this is no HTTP request: {(message or '').partition(':')[0]}"
        if isinstance(exc, LineTooLong):
            return _closing(error_response(HeadTooLarge(what)))
        return _closing(error_response(BadRequest(what)))


def _closing(response: web.Response) -> web.Response:
    response.force_close()
    return response


class _Refusal(asyncio.Protocol):
    """A connection for which there is no room: it is told so, and closed when it has said what it wants."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(_NO_ROOM)
        asyncio.get_running_loop().call_later(LINGER_S, transport.abort)

    def data_received(self, data: bytes) -> None:
        self._transport.close()


def _raw(error: ApiError) -> bytes:
    body = json.dumps(error_body(error))
    head = {"Content-Type": "application/json; charset=utf-8", "Content-Length": len(body), "Connection": "close"}
    lines = [f"{name}: {value}" for name, value in (head | error.headers).items()]
    status = HTTPStatus(error.status)
    return "\r\n".join([f"HTTP/1.1 {status} {status.phrase}", *lines, "", body]).encode()


_NO_ROOM: Final = _raw(
    EngineUnavailable("every connection of this API server is at work, try again", code="too_many_connections")
)


class _WithoutContents(logging.Filter):
    """What the HTTP library says of a request that is none: once a kind, by its kind alone. A traceback would show
    what was sent, a key in a broken header too, and as often as anybody likes."""

    def __init__(self) -> None:
        super().__init__()
        self._faults = FaultLog(log)

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        kind = record.levelname if error is None else type(error).__name__
        self._faults.once(kind, f"event=bad_http kind={kind} further=counted_only")
        return False
