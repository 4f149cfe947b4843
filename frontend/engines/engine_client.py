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
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import zmq

from engine import wire
from engine.wire import Abort, Deployment, Goodbye, Hello, Output, Outputs, Submit, WireError
from frontend.counters import EngineRecord, GroupCommit, RequestRecord
from frontend.engines.admission import Admission
from frontend.engines.generation import Ask, Asked, Generation, Observer, SequenceState
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
    `observe` gives each prompt its observer."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        directory: str,
        identity: Identity,
        record: RequestRecord,
        group: GroupCommit,
        admission: Admission,
        *,
        observe: Callable[[Asked], Observer] | None = None,
    ) -> None:
        self._context = context
        self._directory = directory
        self._identity = identity
        self._record = record
        self._group = group
        self._admission = admission
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

    def check(self, num_sequences: int) -> None:
        """Raises what `submit` would for so many sequences now: ask before what is costly, such as tokenising."""
        self._choose()
        self._admission.check(num_sequences)

    def submit(self, asks: Sequence[Ask]) -> list[Generation]:
        """Send one request's prompts, each with its n sequences to the least loaded engine: all of them, or none. The
        caller closes the generations. Raises EngineUnavailable (no engine is ready), BadRequest or Overloaded (a limit
        would be passed), or TooManyRequests (an engine takes no more messages)."""
        observers = [None if self._observe is None else self._observe(ask.asked) for ask in asks]
        try:
            return self._submit(asks, observers)
        except ApiError as error:
            for observer in observers:
                if observer is not None:
                    observer.refused(error)
            raise

    def _submit(self, asks: Sequence[Ask], observers: Sequence[Observer | None]) -> list[Generation]:
        engines = self._choose_for(asks)
        asked = [ask.asked for ask in asks]
        self._admission.admit(sum(one.n for one in asked), sum(one.n * one.num_prompt_tokens for one in asked))
        begun = [self._begin(*one) for one in zip(engines, asked, observers, strict=True)]
        self._group.now()  # P4: what is sent has been counted. Not awaited: a client that goes now changes nothing
        for ask, (connection, generation) in zip(asks, begun, strict=True):
            message = Submit(
                request_id=generation.sequences[0].request_id,
                engine_incarnation=connection.incarnation,
                prompt_token_ids=ask.prompt_token_ids,
                sampling=ask.asked.sampling,
                priority=ask.asked.priority,
                n=ask.asked.n,
                cache_salt=ask.asked.cache_salt,
            )
            if not connection.submit(message):
                generation.fail(EngineLost("the engine takes no more requests", code="engine_lost"))
        return [generation for _, generation in begun]

    def _choose_for(self, asks: Sequence[Ask]) -> list[EngineConnection]:
        """An engine for each prompt, as if those before were there already."""
        found = []
        num_chosen: Counter[int] = Counter()
        for ask in asks:
            engine, connection = self._choose(num_chosen)
            if not connection.can_submit():
                self._record.rejected("max_num_queued_reqs")
                raise TooManyRequests("the engine's queue is full, try again", code="queue_full")
            num_chosen[engine] += ask.asked.n
            found.append(connection)
        return found

    def _begin(
        self, connection: EngineConnection, asked: Asked, observer: Observer | None
    ) -> tuple[EngineConnection, Generation]:
        """Count a prompt's sequences as submitted, and expect outputs of them."""
        ids = range(self._next_request_id, self._next_request_id + asked.n)
        self._next_request_id += asked.n
        generation = Generation(connection, connection.record, self._group, self._clock, asked, ids, observer)
        connection.begin(generation)
        return connection, generation

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

    def _choose(self, num_chosen: Mapping[int, int] | None = None) -> tuple[int, EngineConnection]:
        """The least loaded engine; `num_chosen` sequences more are about to be sent."""
        self._tell_router(num_chosen)
        engine = self.router.choose()
        connection = None if engine is None else self._connections[engine]
        if engine is None or connection is None:
            raise EngineUnavailable("no engine is ready, try again", code="engine_unavailable")
        return engine, connection

    def _tell_router(self, num_chosen: Mapping[int, int] | None = None) -> None:
        for engine, connection in enumerate(self._connections):
            num_open = 0 if connection is None else connection.num_open
            self.router.on_open(engine, num_open + (num_chosen or {}).get(engine, 0))

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
