"""The API server's side of the work street: one connection to each engine incarnation, and the requests on it.

A connection begins with Hello, which says how many tokens of that engine were ever received here, so that the engine
can book the rest as lost. When the deployment table shows the incarnation ended, everything that can still be read is
read and counted, then what is open fails. A new incarnation has a socket path, and a connection, of its own.

The order for what arrives (P4): count received, hand to the generations, whose deliveries count, commit, then write,
all in one callback of the event loop (`frontend.counters.group_commit`). For what is sent: count submitted, commit,
send.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import zmq

from engine import wire
from engine.wire import Abort, Deployment, Goodbye, Hello, Output, Outputs, Submit, WireError
from frontend.counters import EngineRecord, GroupCommit, RequestRecord
from frontend.engines.generation import Asked, Generation, Observer, SequenceState
from frontend.engines.routing import Router
from frontend.errors import ApiError, EngineLost, EngineUnavailable, TooManyRequests
from frontend.sockets import Messages, SocketReader
from metrics.bulkhead import FaultLog
from metrics.catalogue import ENGINE

log = logging.getLogger(__name__)

# Messages, not bytes. What a frozen API server does not read for ten seconds must fit; a full engine must be noticed.
RECEIVE_HWM = 20_000
SEND_HWM = 2_000
MAX_UNWANTED = 4_096  # aborted sequences whose last tokens may be under way
RETRY_S = 0.05
RECONNECT_S = 0.2  # the engine must have seen the old connection's end, which has the same identity


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Which API server this is."""

    index: int
    incarnation: int


class EngineConnection:
    """The connection to one engine incarnation. `on_goodbye` is called when the engine does not know it (any more)."""

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        hello: Hello,
        record: EngineRecord,
        group: GroupCommit,
        on_goodbye: Callable[[], None],
        on_rejected: Callable[[WireError], None],
    ) -> None:
        self.incarnation = hello.engine_incarnation
        self.record = record
        self._group = group
        self._on_goodbye = on_goodbye
        self._on_rejected = on_rejected
        self._open: dict[int, tuple[Generation, SequenceState]] = {}
        self._unwanted: dict[int, str] = {}  # request id -> why its tokens are undelivered; oldest first
        self._reader = SocketReader(socket, self._on_messages)
        self._send(hello)

    @property
    def num_open(self) -> int:
        """How many of this API server's sequences the engine still owes outputs."""
        return len(self._open)

    def begin(self, generation: Generation) -> None:
        """Expect outputs of these sequences from now on."""
        for sequence in generation.sequences:
            self._open[sequence.request_id] = (generation, sequence)

    def can_submit(self) -> bool:
        """Whether the engine takes another message."""
        return self._reader.can_send()

    def submit(self, message: Submit) -> bool:
        """Send one sequence; False when the engine takes no more."""
        return self._send(message)

    def abort(self, request_ids: Sequence[int], reason: str) -> None:
        """Tell the engine to end these, at once, or as soon as its socket is no longer full."""
        for request_id in request_ids:
            self._unwanted[request_id] = reason
        while len(self._unwanted) > MAX_UNWANTED:
            del self._unwanted[next(iter(self._unwanted))]
        if not self._send(Abort(list(request_ids))) and not self._reader.is_closed:
            asyncio.get_running_loop().call_later(RETRY_S, self.abort, request_ids, reason)

    def forget(self, request_id: int) -> None:
        """No output of it is expected any more."""
        self._open.pop(request_id, None)

    def end(self, error: EngineLost) -> None:
        """Read what can be read, close, and fail what is then still open."""
        self._reader.drain()
        self._reader.close()
        for generation in list(dict.fromkeys(generation for generation, _ in self._open.values())):
            generation.fail(error)
        self._group.now()

    def _send(self, message: Hello | Submit | Abort) -> bool:
        return self._reader.send(wire.encode(message))

    def _on_messages(self, messages: Messages) -> None:
        for parts in messages:
            try:
                message = wire.decode_from_engine(b"".join(parts))
            except WireError as error:
                self._on_rejected(error)
                continue
            if isinstance(message, Goodbye):
                log.warning("event=engine_goodbye incarnation=%d reason=%r", self.incarnation, message.reason)
                asyncio.get_running_loop().call_soon(self._on_goodbye)
            else:
                self._on_outputs(message)
        self._group.now()  # and write

    def _on_outputs(self, outputs: Outputs) -> None:
        self.record.received(sum(len(output.token_ids) for output in outputs.outputs))
        for output in outputs.outputs:
            known = self._open.get(output.request_id)
            if known is None:
                self._on_unwanted(output)
            else:
                generation, sequence = known
                generation.on_output(sequence, output, outputs.at)

    def _on_unwanted(self, output: Output) -> None:
        reason = self._unwanted.get(output.request_id, "disconnect")
        self.record.undelivered(len(output.token_ids), reason)
        if output.finish is not None:
            self._unwanted.pop(output.request_id, None)


class EngineClients:
    """All engines: chooses one for each request, follows the deployment table through their ends and starts.
    `admit` raises ApiError where a request for n sequences may not join the queue; `observe` gives each request its
    observer."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        directory: str,
        identity: Identity,
        record: RequestRecord,
        group: GroupCommit,
        *,
        admit: Callable[[int], None] = lambda n: None,
        observe: Callable[[Asked], Observer] | None = None,
    ) -> None:
        self._context = context
        self._directory = directory
        self._identity = identity
        self._record = record
        self._group = group
        self._admit = admit
        self._observe = observe
        self._clock = time.monotonic
        self._is_closed = False
        self._next_request_id = 1
        self._connections: list[EngineConnection | None] = [None] * len(record.engines)
        self._not_before = [0.0] * len(record.engines)  # when to connect again, after a Goodbye
        self._faults = FaultLog(log)
        self.router = Router(len(record.engines))

    @property
    def has_ready_engine(self) -> bool:
        return self.router.has_ready()

    def admit(self, num_sequences: int) -> None:
        """Raises what `submit` would for so many sequences now: ask before what is costly, such as tokenising."""
        self._choose()
        self._admit(num_sequences)

    def submit(self, prompt_token_ids: list[int], asked: Asked) -> Generation:
        """Send n sequences to the least loaded engine, in one message. The caller closes
        the generation. Raises EngineUnavailable (no engine is ready), Overloaded (a limit is reached) or
        TooManyRequests (the engine takes no more messages)."""
        observer = None if self._observe is None else self._observe(asked)
        try:
            return self._submit(prompt_token_ids, asked, observer)
        except ApiError as error:
            if observer is not None:
                observer.refused(error)
            raise

    def _submit(self, prompt_token_ids: list[int], asked: Asked, observer: Observer | None) -> Generation:
        n = asked.n
        engine, connection = self._choose()
        self._admit(n)
        if not connection.can_submit():
            self._record.rejected("max_num_queued_reqs")
            raise TooManyRequests("the engine's queue is full, try again", code="queue_full")
        ids = range(self._next_request_id, self._next_request_id + n)
        self._next_request_id += n
        generation = Generation(connection, connection.record, self._group, self._clock, asked, ids, observer)
        connection.begin(generation)
        self._group.now()  # P4: what is sent has been counted. Not awaited: a client that goes now changes nothing
        message = Submit(
            request_id=ids[0],
            engine_incarnation=connection.incarnation,
            prompt_token_ids=prompt_token_ids,
            sampling=asked.sampling,
            priority=asked.priority,
            n=n,
            cache_salt=asked.cache_salt,
        )
        if not connection.submit(message):
            generation.fail(EngineLost(f"engine {engine} takes no more requests", code="engine_lost"))
        return generation

    def on_load(self, engine: int, load: float) -> None:
        """A snapshot of the engine said how many sequences run and wait there."""
        self._tell_router()
        self.router.on_load(engine, load)

    def on_deployment(self, table: Deployment) -> None:
        """Connect to engine incarnations that are ready, leave those that have ended. Nothing after `close`."""
        if self._is_closed:
            return
        for engine, connection in enumerate(self._connections):
            if connection is not None and table.has_ended(ENGINE, engine, connection.incarnation):
                self._end(engine, "the engine ended while it worked on the request")
            entry = table.find(ENGINE, engine)
            is_ready = entry is not None and entry.state == "ready" and self._clock() >= self._not_before[engine]
            if self._connections[engine] is None and entry is not None and is_ready:
                self._connect(engine, entry.incarnation)

    def close(self) -> None:
        """Leave every engine, for good; what is open fails."""
        self._is_closed = True
        for engine in range(len(self._connections)):
            self._end(engine, "the API server ends")

    def _choose(self) -> tuple[int, EngineConnection]:
        self._tell_router()
        engine = self.router.choose()
        connection = None if engine is None else self._connections[engine]
        if engine is None or connection is None:
            raise EngineUnavailable("no engine is ready, try again", code="engine_unavailable")
        return engine, connection

    def _tell_router(self) -> None:
        for engine, connection in enumerate(self._connections):
            self.router.on_open(engine, 0 if connection is None else connection.num_open)

    def _connect(self, engine: int, incarnation: int) -> None:
        record = self._record.engines[engine]
        hello = Hello(self._identity.index, self._identity.incarnation, incarnation, record.num_received)
        self._connections[engine] = EngineConnection(
            self._dealer(engine, incarnation),
            hello,
            record,
            self._group,
            on_goodbye=lambda: self._on_goodbye(engine, incarnation),
            on_rejected=self._on_rejected,
        )
        self.router.on_ready(engine)
        log.info("event=engine_connected engine=%d incarnation=%d", engine, incarnation)

    def _dealer(self, engine: int, incarnation: int) -> zmq.Socket[bytes]:
        """RCVHWM and SNDHWM as above, LINGER 0, sends never block. Not IMMEDIATE: Hello waits for the connection."""
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.ROUTING_ID, wire.identity(self._identity.index, self._identity.incarnation))
        socket.setsockopt(zmq.RCVHWM, RECEIVE_HWM)
        socket.setsockopt(zmq.SNDHWM, SEND_HWM)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(wire.work_endpoint(self._directory, engine, incarnation))
        return socket

    def _end(self, engine: int, why: str) -> None:
        connection, self._connections[engine] = self._connections[engine], None
        self.router.on_ended(engine)
        if connection is not None:
            num_open = connection.num_open
            connection.end(EngineLost(why, code="engine_lost"))
            log.info("event=engine_left engine=%d incarnation=%d open=%d", engine, connection.incarnation, num_open)

    def _on_goodbye(self, engine: int, incarnation: int) -> None:
        """Begin anew with the same incarnation: with the deployment table that comes after a moment."""
        connection = self._connections[engine]
        if connection is None or connection.incarnation != incarnation:
            return
        self._end(engine, "the engine gave this API server's requests up")
        self._not_before[engine] = self._clock() + RECONNECT_S

    def _on_rejected(self, error: WireError) -> None:
        self._record.wire_rejected("from_engine")
        self._faults.rejected("from_engine", error)
