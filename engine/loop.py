"""`python -m engine.loop --config-fd N`: one engine process, whose main thread is the loop.

    receive -> step (schedule, run, record) -> commit -> send

Order everywhere (P4): count, commit, then hand over. The loop owns the ROUTER, the tally's file and the signal flag;
the beacon (`engine.beacon`) broadcasts what was committed from a thread of its own.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Final, Protocol

import setproctitle
import zmq

from engine import wire
from engine.batch import Batch, Runner
from engine.beacon import Beacon, FaultLog, Shared
from engine.block_pool import BlockPool
from engine.config import EngineConfig, engine_config_from_json
from engine.console import Console
from engine.core import ApiServer, EngineCore
from engine.record import Recorder
from engine.scheduler import Scheduler
from engine.wire import Abort, Goodbye, Hello, Outputs, Submit, WireError
from metrics.deployment import ENGINE, Facts, Failed, Ready
from metrics.layout import Layout, Shape, build_layout
from metrics.lifeline import Lifeline
from metrics.process import ProcessMetrics
from metrics.store import StoreError, TallyStore, tally_path

log = logging.getLogger("engine.loop")

# Messages, not bytes. What a frozen API server does not read for ten seconds must fit; a lost one must be noticed.
SEND_HWM: Final = 20_000
RECEIVE_HWM: Final = 10_000
IDLE_WAIT_MS: Final = 100
HOUSEKEEPING_S: Final = 1.0


class ModelRunner(Runner, Protocol):
    """A runner that says what its model and cache are."""

    num_blocks: int
    block_size: int
    max_model_len: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    cache_dtype: str


RunnerFactory = Callable[[EngineConfig, Callable[[str], None]], ModelRunner]  # raises CannotServeError


class CannotServeError(Exception):
    """A model that cannot be served, today or tomorrow; one line for the operator."""


class EngineLoop:
    """The loop's state; `turn` is one round."""

    def __init__(
        self,
        config: EngineConfig,
        core: EngineCore,
        recorder: Recorder,
        store: TallyStore,
        router: zmq.Socket[bytes],
        shared: Shared,
        faults: FaultLog,
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
        layout = store.tally.layout
        self._faults = {
            where: layout.cell("wholebatch:bulkhead_errors_total", where=where)
            for where in ("commit", "process", "console")
        }
        self._known: dict[bytes, ApiServer] = {}  # routing identities that have said Hello
        self._greeted: set[int] = set()  # API-server indices that have said Hello in this engine's life
        self._oldest = [0] * config.num_api_servers  # by index: earlier incarnations are known to have ended
        self._fault_log = faults
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
            self._commit()
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
            self._guard("process", self._process.update)
            self._guard("console", lambda: self._log_stats(now))
            has_news = True
        if has_news:
            self._commit()

    def _log_stats(self, now: float) -> None:
        line = self._console.line(now)
        if line is not None:
            log.info(line)

    def _commit(self) -> None:
        self._guard("commit", self._store.commit)

    def _guard(self, where: str, action: Callable[[], None]) -> None:
        """The loop's bulkhead: a fault of the statistics is counted, logged once a kind, and serving goes on (P8)."""
        try:
            action()
        except Exception as error:  # noqa: BLE001
            self._store.tally.inc(self._faults[where])
            self._fault_log.log("bulkhead", where, error)

    # --- receive ---

    def _receive(self) -> bool:
        """Handle everything that has arrived; whether anything had."""
        has_news = False
        while not self._shared.ended.empty():
            index, incarnation = self._shared.ended.get()
            self._oldest[index] = max(self._oldest[index], incarnation + 1)
            self._drop((index, incarnation), "ended")
            has_news = True
        while True:
            try:
                identity, *parts = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return has_news
            has_news = True
            try:
                self._handle(identity, wire.decode_from_api_server(b"".join(parts)))
            except WireError as error:
                self._store.tally.inc(self._rejected)
                self._fault_log.log("wire_rejected", "from_api_server", error)

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
        """A new pair of incarnations: what this API server was sent and says it never received is lost."""
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
        self._known[identity] = api_server
        log.info("event=hello api_server=%d incarnation=%d lost_tokens=%d", *api_server, num_lost)

    def _say_goodbye(self, identity: bytes, reason: str) -> None:
        try:
            self._router.send_multipart([identity, wire.encode(Goodbye(self._config.incarnation, reason))], zmq.NOBLOCK)
        except zmq.ZMQError:
            return  # it is gone as well

    def _drop(self, api_server: ApiServer, why: str) -> None:
        """Its requests are aborted, its connection is known no more."""
        identity = wire.identity(*api_server)
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


# --- the process ---


def load_runner(config: EngineConfig, progress: Callable[[str], None]) -> ModelRunner:
    """The model of the configuration; raises CannotServeError."""
    # Here, not above: what runs another runner has no need of torch and its seconds of importing.
    from engine.runner import TorchRunner
    from engine.weights.spec import ModelError

    facts = config.facts
    try:
        return TorchRunner.load(
            config.model,
            config.cache,
            config.scheduler,
            max_model_len_fixed=None if facts is None else facts.max_model_len,
            num_blocks_fixed=None if facts is None else facts.num_gpu_blocks,
            num_threads=_num_threads(config.num_engines),
            progress=progress,
        )
    except ModelError as error:
        raise CannotServeError(str(error)) from error


def _num_threads(num_engines: int) -> int:
    """What OMP_NUM_THREADS says, as everywhere; else this engine's even share of the cores."""
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    return int(chosen) if chosen.isdigit() and int(chosen) else max(1, len(os.sched_getaffinity(0)) // num_engines)


def run(config: EngineConfig, runner: ModelRunner, lifeline: Lifeline) -> None:
    """Serve until SIGTERM. Raises StoreError where the tally cannot be kept."""
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopping.append(number))
    layout = _layout(config, runner)
    store = TallyStore.open(
        tally_path(config.directory, ENGINE, config.index),
        layout,
        incarnation=config.incarnation,
        now_unix=time.time(),
        gauges_only=not config.stats.log_stats,
    )
    if store.set_aside is not None:
        log.error("event=tally_set_aside reason=%r", store.set_aside)
    recorder = Recorder(store.tally, layout, config.num_api_servers)
    num_open = recorder.close_books()
    store.tally.set(layout.cell("wholebatch:engine_incarnation"), config.incarnation)
    store.commit()
    if num_open:
        log.warning("event=books_closed sequences_ended_by_error=%d", num_open)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = bind_router(context, wire.work_endpoint(config.directory, config.index, config.incarnation))
    shared = Shared()
    beacon = Beacon(config, layout, store, shared, lifeline)
    faults = FaultLog(log)
    loop = EngineLoop(config, make_core(config, runner, recorder, faults), recorder, store, router, shared, faults)
    beacon.start()
    lifeline.report(Ready(facts=_facts(config, runner)))
    log.info("event=ready engine=%d incarnation=%d", config.index, config.incarnation)
    try:
        while not stopping:
            loop.turn()
    finally:
        store.commit()
        beacon.stop()
        context.destroy(linger=1000)  # ms: for what API servers have not read yet
        log.info("event=stopped engine=%d", config.index)


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


def _layout(config: EngineConfig, runner: ModelRunner) -> Layout:
    shape = Shape(
        num_engines=config.num_engines,
        num_api_servers=config.num_api_servers,
        max_model_len=runner.max_model_len,
        bucket_overrides=config.stats.bucket_overrides,
    )
    return build_layout(ENGINE, shape)


def make_core(config: EngineConfig, runner: ModelRunner, recorder: Recorder, faults: FaultLog) -> EngineCore:
    """The engine without its sockets."""
    pool = BlockPool(runner.num_blocks, runner.block_size, config.cache.enable_prefix_caching)
    scheduler = Scheduler(
        config.scheduler,
        pool,
        max_model_len=runner.max_model_len,
        eos_token_ids=runner.eos_token_ids,
        vocab_size=runner.vocab_size,
    )
    return EngineCore(
        scheduler,
        runner,
        recorder,
        time.monotonic,
        incarnation=config.incarnation,
        iteration_log=_log_iteration if config.stats.log_iteration_details else None,
        on_fault=lambda fault: faults.log("bulkhead", "record", fault),
    )


def _log_iteration(batch: Batch) -> None:
    """From the batch itself, before it runs: a witness that knows nothing of what is counted."""
    scheduled = sum(part.num_tokens for part in batch.sequences)
    log.info("event=iteration requests=%d scheduled_tokens=%d", len(batch.sequences), scheduled)


def _facts(config: EngineConfig, runner: ModelRunner) -> Facts:
    return Facts(
        model_name=config.served_model_name,
        max_model_len=runner.max_model_len,
        vocab_size=runner.vocab_size,
        block_size=runner.block_size,
        num_gpu_blocks=runner.num_blocks,
        cache_dtype=runner.cache_dtype,
        enable_prefix_caching=config.cache.enable_prefix_caching,
    )


def main(arguments: list[str] | None = None, runner_factory: RunnerFactory = load_runner) -> int:
    """Exit code 0 after SIGTERM, 1 after a failure that may pass, 2 where starting again would not help."""
    parser = argparse.ArgumentParser(prog="python -m engine.loop", description=__doc__)
    parser.add_argument("--config-fd", type=int, required=True, help="descriptor that the configuration is read from")
    with os.fdopen(parser.parse_args(arguments).config_fd, encoding="utf-8") as file:
        config = engine_config_from_json(file.read())
    setproctitle.setproctitle(f"wholebatch engine {config.index}")
    form = f"%(asctime)s level=%(levelname)s process=engine-{config.index} %(message)s"
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format=form)
    lifeline = Lifeline(config.lifeline_fd)
    try:
        runner = runner_factory(config, lambda line: log.info("event=loading what=%r", line))
        run(config, runner, lifeline)
    except StoreError as error:
        log.error("event=start_failed error=%r", str(error))  # to be tried again: a full disk may have room by then
        return 1
    except CannotServeError as error:
        lifeline.report(Failed(message=str(error)))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
