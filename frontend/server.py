"""`python -m frontend.server --config-fd N`: one API server process, started by the supervisor.

It inherits its sockets: the public one, listening already and shared by all API servers, so that the death of one takes
no queued connection with it, and an admin socket of its own. It ends at once when the supervisor does, and in an
orderly way on the supervisor's STOP_SIGNAL: give up export rights, stop accepting, let requests finish, close.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import sys
from collections.abc import Callable, Coroutine
from typing import Any, Final

import setproctitle
import zmq

from engine.wire import (
    STOP_SIGNAL,
    Alive,
    Deployment,
    Facts,
    Failed,
    Lifeline,
    Ready,
    ServerConfig,
    WireError,
    decode_server_config,
    obey_the_supervisor_alone,
)
from frontend.app import State, admin_app, public_app
from frontend.connections import CANCEL_S, Listener
from frontend.deployment_view import DeploymentView
from frontend.services import Services
from frontend.text import Tokenizer, TokenizerError, load_tokenizer
from metrics.files import StoreError

try:
    import uvloop
except ImportError:  # not on this platform
    uvloop = None  # type: ignore[assignment]

log = logging.getLogger("frontend.server")

ALIVE_S: Final = 0.5


class Server:
    """The process's life: start, serve, drain, end."""

    def __init__(self, config: ServerConfig, lifeline: Lifeline) -> None:
        self._config = config
        self._lifeline = lifeline
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._view = DeploymentView(self._context, config.directory)
        self._state = State(config, self._view)
        state, head_timeout_s = self._state, config.http.head_timeout_s
        self._public = Listener(public_app(state), state.connections, head_timeout_s, state.refused)
        self._admin = Listener(admin_app(state), state.admin_connections, head_timeout_s, state.refused)
        self._stopping = asyncio.Event()
        self._progress = 0

    async def run(self) -> int:
        """The exit code."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(STOP_SIGNAL, self._stopping.set)
        loop.add_reader(self._lifeline.fileno(), self._on_lifeline)
        alive = asyncio.create_task(self._report_alive())
        try:
            await self._serve()
            return 0
        except TokenizerError as error:
            log.error("event=start_failed error=%r", str(error))
            self._lifeline.report(Failed(message=str(error)))
            return 2
        except StoreError as error:
            log.error("event=start_failed error=%r", str(error))
            # Ends a deployment that has never been ready; another tries again: a full disk may have room by then.
            self._lifeline.report(Failed(message=str(error)))
            return 1
        finally:
            await self._end()
            alive.cancel()

    async def _serve(self) -> None:
        """Accept from the start while the deployment itself starts, with an honest 503; but a restarted API server
        accepts only once it can serve, since others can serve meanwhile."""
        if not await asyncio.to_thread(os.path.isdir, self._config.directory):
            raise StoreError(f"the deployment's directory is gone: {self._config.directory}")
        await self._admin.start(self._config.admin_fd)
        table = await self._until(self._next_table(lambda table: True))
        is_accepting = table is not None and table.facts is None
        if is_accepting:
            await self._public.start(self._config.listen_fd)
        tokenizer = await asyncio.to_thread(load_tokenizer, self._config.model.path)
        table = await self._until(self._next_table(lambda table: table.facts is not None))
        if table is None or table.facts is None:
            return
        self._begin(table.facts, tokenizer)
        if not is_accepting:
            await self._public.start(self._config.listen_fd)
        gc.collect()
        gc.freeze()  # Measured: 11.9 µs a streamed token, 12.5 when collections walk all that starting made
        self._lifeline.report(Ready())
        log.info("event=ready incarnation=%d", self._config.incarnation)
        await self._stopping.wait()

    def _begin(self, facts: Facts, tokenizer: Tokenizer) -> None:
        self._state.services = Services(self._config, facts, self._context, self._view, tokenizer)

    async def _next_table(self, is_wanted: Callable[[Deployment], bool]) -> Deployment:
        """The first table that is wanted."""
        found: asyncio.Future[Deployment] = asyncio.get_running_loop().create_future()

        def look(table: Deployment) -> None:
            if is_wanted(table) and not found.done():
                found.set_result(table)

        unsubscribe = self._view.subscribe(look)
        try:
            return await found
        finally:
            unsubscribe()

    async def _until(self, wanted: Coroutine[Any, Any, Deployment]) -> Deployment | None:
        """What is awaited; None if the end comes first."""
        waiting = asyncio.create_task(wanted)
        stopping = asyncio.create_task(self._stopping.wait())
        done, pending = await asyncio.wait({waiting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        return waiting.result() if waiting in done else None

    async def _end(self) -> None:
        """Rights first, so that another exports at once; then the requests; then everything else."""
        log.info("event=stopping drain_timeout_s=%s", self._config.patience.drain_timeout_s)
        services = self._state.services
        if services is not None:
            services.exporter.resign()
        self._state.is_draining = True
        self._public.stop()
        if services is not None and not await self._are_answered(self._config.patience.drain_timeout_s):
            services.clients.close()  # what is still open ends with an error, in streams with an event
            await self._are_answered(CANCEL_S)
        await self._public.close()
        if services is not None:
            await services.close()
        await self._admin.close()
        self._view.close()
        self._context.destroy(linger=0)
        log.info("event=stopped")

    async def _are_answered(self, within_s: float) -> bool:
        """Waits until no request is open; whether that came in time."""
        try:
            async with asyncio.timeout(within_s):
                await self._state.answered.wait()
        except TimeoutError:
            return False
        return True

    async def _report_alive(self) -> None:
        while True:
            self._progress += 1  # the event loop turns: that is an API server's progress
            services = self._state.services
            self._lifeline.report(Alive(progress=self._progress, is_busy=services is not None and services.is_busy))
            await asyncio.sleep(ALIVE_S)

    def _on_lifeline(self) -> None:
        if self._lifeline.is_severed():
            os._exit(1)  # the supervisor is gone; what was counted is committed


def _read_config(descriptor: int) -> ServerConfig:
    with os.fdopen(descriptor, "rb") as file:
        return decode_server_config(file.read())


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 after STOP_SIGNAL, 1 after a failure, 2 for a configuration or a model that cannot be used."""
    obey_the_supervisor_alone()
    parser = argparse.ArgumentParser(prog="python -m frontend.server", description=__doc__)
    parser.add_argument("--config-fd", type=int, required=True, help="descriptor that the configuration is read from")
    try:
        config = _read_config(parser.parse_args(arguments).config_fd)
        if config.stats.is_traced:
            import frontend.tracing.otlp  # noqa: F401  before anything is served: the packages are optional
    except (WireError, OSError) as error:
        print(f"frontend.server: cannot read the configuration: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"frontend.server: OTLP needs the packages of 'wholebatch[otel]': {error}", file=sys.stderr)
        return 2
    setproctitle.setproctitle(f"wholebatch api-server {config.index}")
    name = f"api-server-{config.index}"
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s level=%(levelname)s process={name} %(message)s")

    async def serve() -> int:
        return await Server(config, Lifeline(config.lifeline_fd)).run()

    with asyncio.Runner(loop_factory=None if uvloop is None else uvloop.new_event_loop) as runner:
        return runner.run(serve())


if __name__ == "__main__":
    sys.exit(main())
