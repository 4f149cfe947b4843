"""The loop of one engine, turn by turn. `engine.loop.process` is the process around it.

    receive -> step (schedule, run, record) -> commit -> send

Order everywhere (P4): count, commit, then hand over. The loop owns the ROUTER and the tally's file; the beacon
(`engine.loop.beacon`) broadcasts what was committed from a thread of its own.
"""

from __future__ import annotations

import logging
import time
from typing import Final

import zmq

from engine import wire
from engine.loop.beacon import Shared
from engine.loop.core import ApiServer, EngineCore
from engine.schedule import Console, Recorder
from engine.wire import Abort, EngineConfig, Goodbye, Hello, Outputs, Submit, WireError
from metrics.bulkhead import Bulkhead
from metrics.files import TallyStore
from metrics.usage import ProcessMetrics

log = logging.getLogger("engine.loop.loop")

# Messages, not bytes. What a frozen API server does not read for ten seconds must fit; a lost one must be noticed.
SEND_HWM: Final = 20_000
RECEIVE_HWM: Final = 10_000
IDLE_WAIT_MS: Final = 100
HOUSEKEEPING_S: Final = 1.0


class EngineLoop:
    """Runs the engine: `turn` is one round of the loop."""

    def __init__(
        self,
        config: EngineConfig,
        core: EngineCore,
        recorder: Recorder,
        store: TallyStore,
        router: zmq.Socket[bytes],
        shared: Shared,
        bulkhead: Bulkhead,
    ) -> None:
        self._config = config
        self._core = core
        self._recorder = recorder
        self._store = store
        self._router = router
        self._shared = shared
        self._console = Console(store.tally, time.monotonic())
        self._process = ProcessMetrics(store.tally)
        self._rejected = store.tally.layout.cell("wholebatch:wire_rejected_total", kind="from_api_server")
        self._known: dict[bytes, ApiServer] = {}  # routing identities that have said Hello
        self._greeted: set[int] = set()  # API-server indices that have said Hello in this engine's life
        self._oldest = [0] * config.num_api_servers  # by index: earlier incarnations are known to have ended
        self._given_up: set[bytes] = set()  # identities that took no more, and have not been told of it yet
        self._bulkhead = bulkhead
        self._housekeeping_at = 0.0

    def turn(self) -> None:
        """Take what has arrived, run one iteration if there is work, commit, send. Waits only when there is none."""
        began = time.perf_counter()
        if not self._core.has_work:
            self._router.poll(IDLE_WAIT_MS)
            began = time.perf_counter()
        has_news = self._receive()
        has_work = self._core.has_work
        self._shared.is_busy = has_work
        self._shared.progress += 1
        if has_work:
            self._recorder.stages(receive_s=time.perf_counter() - began)
            self._core.on_iteration = self._shared.iterations.append if self._shared.wants_iterations else None
            outputs = self._core.step()
            stepped = time.perf_counter()
            self.commit()
            committed = time.perf_counter()
            self._send(outputs)
            self._recorder.stages(record_s=committed - stepped, send_s=time.perf_counter() - committed)
            self._shared.is_busy = self._core.has_work
        self._keep_house(has_news)

    def _keep_house(self, has_news: bool) -> None:
        """Once a second what concerns the process; and a commit, whenever something was counted outside of a step."""
        now = time.monotonic()
        if now >= self._housekeeping_at:
            self._housekeeping_at = now + HOUSEKEEPING_S
            with self._bulkhead.around("process"):
                self._process.update()
            with self._bulkhead.around("console"):
                self._log_stats(now)
            for identity in list(self._given_up):
                self._say_goodbye(identity, "it took no more messages")
            has_news = True
        if has_news:
            self.commit()

    def _log_stats(self, now: float) -> None:
        line = self._console.line(now)
        if line is not None:
            log.info(line)

    def commit(self) -> None:
        """Make durable what was counted."""
        with self._bulkhead.around("commit"):
            self._store.commit()

    # --- receive ---

    def _receive(self) -> bool:
        """Handle everything that has arrived; whether anything had."""
        has_news = False
        while not self._shared.ended.empty():
            index, incarnation = self._shared.ended.get()
            self._oldest[index] = max(self._oldest[index], incarnation + 1)
            self._drop((index, incarnation), "ended")
            has_news = True
        for _ in range(RECEIVE_HWM):  # and no more, whatever comes meanwhile: running sequences wait
            try:
                identity, *parts = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            has_news = True
            try:
                self._handle(identity, wire.decode_from_api_server(b"".join(parts)))
            except WireError as error:
                self._store.tally.inc(self._rejected)
                self._bulkhead.faults.rejected("from_api_server", error)
        return has_news

    def _handle(self, identity: bytes, message: Hello | Submit | Abort) -> None:
        if isinstance(message, Hello):
            self._greet(identity, message)
            return
        api_server = self._known.get(identity)
        if api_server is None:
            self._say_goodbye(identity, "no Hello on this connection, or it was given up")
        elif isinstance(message, Submit):
            self._core.submit(api_server, message, time.monotonic())
        else:
            self._core.abort(api_server, message.request_ids)

    def _greet(self, identity: bytes, hello: Hello) -> None:
        """Begin with this incarnation of an API server: what its index was sent and says it never received is lost."""
        api_server = wire.parse_identity(identity)
        if api_server != (hello.api_server, hello.incarnation) or hello.api_server >= self._config.num_api_servers:
            raise WireError(f"Hello of {hello.api_server}.{hello.incarnation} from {identity!r}")
        if hello.engine_incarnation != self._config.incarnation:
            self._say_goodbye(identity, f"this is incarnation {self._config.incarnation}")
            return
        if hello.incarnation < self._oldest[hello.api_server]:
            return  # its last words, overtaken by the news of its end or by its successor's Hello
        self._oldest[hello.api_server] = hello.incarnation
        for known in [k for k in self._known.values() if k[0] == hello.api_server]:
            self._drop(known, "replaced")
        reason = "server_lost" if hello.api_server in self._greeted else "engine_lost"
        num_lost = self._recorder.settle(hello.api_server, hello.received_tokens, reason)
        self._greeted.add(hello.api_server)
        self._given_up.discard(identity)
        self._known[identity] = api_server
        log.info("event=hello api_server=%d incarnation=%d lost_tokens=%d", *api_server, num_lost)

    def _say_goodbye(self, identity: bytes, reason: str) -> None:
        """Tell an API server that this engine does not know it (any more). Where its queue is full, it is told later:
        otherwise it would wait for its tokens for ever."""
        self._given_up.discard(identity)
        try:
            self._router.send_multipart([identity, wire.encode(Goodbye(self._config.incarnation, reason))], zmq.NOBLOCK)
        except zmq.Again:
            self._given_up.add(identity)
        except zmq.ZMQError:
            return  # it is gone as well

    def _drop(self, api_server: ApiServer, why: str) -> None:
        """Abort the requests of an API server, and forget its connection."""
        identity = wire.identity(*api_server)
        self._given_up.discard(identity)
        if self._known.pop(identity, None) is not None:
            self._core.drop_api_server(api_server)
            log.info("event=api_server_left api_server=%d incarnation=%d why=%s", *api_server, why)

    # --- send ---

    def _send(self, outputs: dict[ApiServer, Outputs]) -> None:
        """Never waits: an API server that takes no more, or is not there, is lost."""
        for api_server, message in outputs.items():
            try:
                self._router.send_multipart([wire.identity(*api_server), wire.encode(message)], zmq.NOBLOCK)
            except zmq.ZMQError as error:
                self._drop(api_server, f"lost errno={error.errno}")
                if isinstance(error, zmq.Again):
                    self._given_up.add(wire.identity(*api_server))


def bind_router(context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> zmq.Socket[bytes]:
    """MANDATORY: who cannot be sent to is an error, not silence. HANDOVER: a new connection replaces the old one of the
    same identity. Bounded; sends never block."""
    router = context.socket(zmq.ROUTER)
    router.set(zmq.ROUTER_MANDATORY, 1)
    router.set(zmq.ROUTER_HANDOVER, 1)
    router.set(zmq.SNDHWM, SEND_HWM)
    router.set(zmq.RCVHWM, RECEIVE_HWM)
    router.set(zmq.LINGER, 1000)
    router.bind(endpoint)
    return router
