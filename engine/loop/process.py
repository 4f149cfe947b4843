"""`python -m engine.loop.process --config-fd N`: one engine process.

The main thread loads the model and then runs the loop (`engine.loop.loop`); a second one is the beacon
(`engine.loop.beacon`). STOP_SIGNAL ends it after the iteration that runs; the supervisor's end, at once.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final, Protocol

import setproctitle
import zmq

from engine import wire
from engine.host import share
from engine.loop.beacon import Beacon, Shared
from engine.loop.core import EngineCore
from engine.loop.loop import EngineLoop, bind_router
from engine.schedule import Batch, BlockPool, Recorder, Runner, Scheduler
from engine.wire import STOP_SIGNAL, Alive, EngineConfig, Facts, Failed, Lifeline, Ready, obey_the_supervisor_alone
from metrics.broadcast import BroadcastError
from metrics.bulkhead import Bulkhead
from metrics.catalogue import ENGINE
from metrics.files import StoreError, TallyStore, tally_path
from metrics.layout import Layout, build_layout

log = logging.getLogger("engine.loop.process")

WATCH_S: Final = 0.5


class ModelRunner(Runner, Protocol):
    """A runner that says what its model and cache are."""

    num_blocks: int
    block_size: int
    max_model_len: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    cache_dtype: str
    suited_budget: int  # tokens of one iteration
    suited_iteration_s: float | None  # how long one may take in which some decode; None: however long


RunnerFactory = Callable[[EngineConfig, Callable[[str], None]], ModelRunner]  # raises CannotServeError


class CannotServeError(Exception):
    """A model that cannot be served, today or tomorrow; one line for the operator."""


def load_runner(config: EngineConfig, progress: Callable[[str], None]) -> ModelRunner:
    """The model of the configuration; raises CannotServeError."""
    # NOTE: before torch, whose OpenMP may be told to bind to one core
    host_share = share(config.num_engines)
    # Here, not above: what runs another runner has no need of torch and its seconds of importing.
    from engine.device import ModelError, TorchRunner

    facts = config.facts
    try:
        return TorchRunner.load(
            replace(config.model, seed=own_seed(config)),
            config.cache,
            config.scheduler,
            max_model_len_fixed=None if facts is None else facts.max_model_len,
            num_blocks_fixed=None if facts is None else facts.num_gpu_blocks,
            num_threads=_chosen_threads(),
            host_share=host_share,
            progress=progress,
        )
    except ModelError as error:
        raise CannotServeError(str(error)) from error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):  # torch has no class of its own for it
            raise
        reason = str(error).partition("\n")[0]
        raise CannotServeError(f"{config.model.path}: not enough memory: {reason}") from error


def own_seed(config: EngineConfig) -> int:
    """The seed of this engine incarnation's unseeded samples: no two share one, else they would draw alike."""
    if config.model.seed is None:
        return secrets.randbits(64)
    key = f"{config.model.seed} {config.index} {config.incarnation}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")


def _chosen_threads() -> int | None:
    """The number of threads that OMP_NUM_THREADS asks for, if it does."""
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    return int(chosen) if chosen.isdigit() and int(chosen) else None


@contextlib.contextmanager
def ended_with_supervisor(lifeline: Lifeline, on_orphaned: Callable[[], None] = lambda: os._exit(1)) -> Iterator[None]:
    """Report, and end with the supervisor, until the beacon does so: loading takes minutes."""
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(WATCH_S):
            if lifeline.is_severed():
                on_orphaned()
            lifeline.report(Alive(progress=0, is_busy=False))

    watcher = threading.Thread(target=watch, name="watch", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()


def run(config: EngineConfig, runner: ModelRunner, lifeline: Lifeline) -> None:
    """Serve until STOP_SIGNAL. Raises StoreError where the tally cannot be kept, BroadcastError without its sockets."""
    stopping: list[int] = []
    signal.signal(STOP_SIGNAL, lambda number, frame: stopping.append(number))
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
    bulkhead = Bulkhead(recorder.faulted, log)
    loop = EngineLoop(config, make_core(config, runner, recorder, bulkhead), recorder, store, router, shared, bulkhead)
    beacon.start()
    gc.collect()
    gc.freeze()  # Measured: a collection that walks all that loading made stops the loop for 12 ms
    lifeline.report(Ready(facts=_facts(config, runner)))
    log.info("event=ready engine=%d incarnation=%d", config.index, config.incarnation)
    try:
        while not stopping:
            loop.turn()
    finally:
        loop.commit()
        beacon.stop()
        context.destroy(linger=1000)  # ms: for what API servers have not read yet
        log.info("event=stopped engine=%d", config.index)


def _layout(config: EngineConfig, runner: ModelRunner) -> Layout:
    return build_layout(ENGINE, config.shape(runner.max_model_len))


def make_core(config: EngineConfig, runner: ModelRunner, recorder: Recorder, bulkhead: Bulkhead) -> EngineCore:
    """The engine without its sockets."""
    pool = BlockPool(runner.num_blocks, runner.block_size, config.cache.enable_prefix_caching)
    scheduler = Scheduler(
        config.scheduler,
        pool,
        max_model_len=runner.max_model_len,
        eos_token_ids=runner.eos_token_ids,
        vocab_size=runner.vocab_size,
        suited_budget=runner.suited_budget,
        suited_iteration_s=runner.suited_iteration_s,
    )
    return EngineCore(
        scheduler,
        runner,
        recorder,
        time.monotonic,
        bulkhead,
        incarnation=config.incarnation,
        iteration_log=_log_iteration if config.stats.log_iteration_details else None,
        on_sampling_fault=lambda fault: bulkhead.faults.once(
            "sequence_fault", f"event=sequence_fault kind=sampling error={fault!r} further=counted_only"
        ),
    )


def _log_iteration(batch: Batch) -> None:
    """From the batch itself, before it runs: a witness that knows nothing of what is counted."""
    scheduled = sum(part.num_tokens for part in batch.sequences)
    log.info("event=iteration requests=%d scheduled_tokens=%d", len(batch.sequences), scheduled)


def _facts(config: EngineConfig, runner: ModelRunner) -> Facts:
    return Facts(
        model_name=config.model.served_model_names[0],
        max_model_len=runner.max_model_len,
        vocab_size=runner.vocab_size,
        block_size=runner.block_size,
        num_gpu_blocks=runner.num_blocks,
        cache_dtype=runner.cache_dtype,
        enable_prefix_caching=config.cache.enable_prefix_caching,
    )


def main(arguments: list[str] | None = None, runner_factory: RunnerFactory = load_runner) -> int:
    """Exit code 0 after STOP_SIGNAL, 1 after a failure that may pass, 2 where starting again would not help."""
    obey_the_supervisor_alone()
    parser = argparse.ArgumentParser(prog="python -m engine.loop.process", description=__doc__)
    parser.add_argument("--config-fd", type=int, required=True, help="descriptor that the configuration is read from")
    with os.fdopen(parser.parse_args(arguments).config_fd, "rb") as file:
        config = wire.decode_engine_config(file.read())
    setproctitle.setproctitle(f"wholebatch engine {config.index}")
    form = f"%(asctime)s level=%(levelname)s process=engine-{config.index} %(message)s"
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format=form)
    lifeline = Lifeline(config.lifeline_fd)
    try:
        with ended_with_supervisor(lifeline):
            runner = runner_factory(config, lambda line: log.info("event=loading what=%r", line))
        run(config, runner, lifeline)
    except (StoreError, BroadcastError) as error:
        log.error("event=start_failed error=%r", str(error))
        # Ends a deployment that has never been ready; another tries again: a full disk may have room by then.
        lifeline.report(Failed(message=str(error)))
        return 1
    except CannotServeError as error:
        lifeline.report(Failed(message=str(error)))
        return 2
    finally:
        lifeline.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
