"""An ASGI middleware for vLLM's API servers: `GET /metrics` is vLLM's own answer, with whole iterations in it.

vLLM answers as it always does; the families that ours replace are taken out, and ours, read from every process's tally,
are added. Whoever answers reads the same files, so the answer is the same at any number of API servers. While no engine
core counts, and where anything of ours fails, vLLM's answer goes out as it is.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any, Final

from frontend.vllm.families import NOT_OF_ENGINES, NOT_OF_PROCESSES, without_ours
from metrics.bulkhead import Bulkhead
from metrics.catalogue import API_SERVER, ENGINE, VLLM_API_SERVER, VLLM_ENGINE, Scope
from metrics.exposition import PROCESS_SCOPES, TEXT, Part, Renderer, Template, scrape_part
from metrics.files import StoreError, TallyReader, TallyStore, tally_path
from metrics.layout import Layout
from metrics.usage import ProcessMetrics, python_info
from metrics.vllm import (
    Core,
    HookError,
    claim_server,
    directory,
    find_cores,
    find_servers,
    hook_bulkhead,
    server_layout,
)

log = logging.getLogger("vllm.wholebatch")  # below vLLM's own logger, so that its handlers print it

PROCESS_INTERVAL_S: Final = 1.0

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class Metrics:
    """The middleware. Made once in each API server's process."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._server: _Server | None = None
        try:
            self._server = _Server(*claim_server())
        except (HookError, StoreError, OSError) as error:
            log.error("event=vllm_hook_disabled error=%r", str(error))

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One request, or the application's life."""
        if self._server is not None:
            self._server.keep_house()
        if self._server is None or not _is_scrape(scope):
            await self._app(scope, receive, send)
            return
        answer = _Answer()
        plain = [(name, value) for name, value in scope["headers"] if name not in (b"accept", b"accept-encoding")]
        await self._app({**scope, "headers": plain}, receive, answer.take)
        if answer.status == 200:
            with self._server.bulkhead.around("scrape"):
                answer.replace(self._server.exposition(bytes(answer.body)))
        for message in answer.messages():
            await send(message)


def _is_scrape(scope: Message) -> bool:
    if scope["type"] != "http" or scope["method"] != "GET":
        return False
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    return path == "/metrics" or path.startswith("/metrics/")  # vLLM answers whatever is below it with the same


class _Answer:
    """What vLLM answers, held until it is complete."""

    def __init__(self) -> None:
        self.status = 0
        self.body = bytearray()
        self._start: Message = {}

    async def take(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start, self.status = message, message["status"]
        elif message["type"] == "http.response.body":
            self.body += message.get("body", b"")

    def replace(self, body: bytes) -> None:
        length = (b"content-length", str(len(body)).encode())
        others = [(name, value) for name, value in self._start.get("headers", ()) if name.lower() != length[0]]
        self._start = {**self._start, "headers": [*others, length]}
        self.body = bytearray(body)

    def messages(self) -> Iterator[Message]:
        yield self._start
        yield {"type": "http.response.body", "body": bytes(self.body)}


class _Server:
    """This API server's own tally, and everybody's for an answer."""

    def __init__(self, index: int, store: TallyStore) -> None:
        self.bulkhead: Bulkhead = hook_bulkhead(store.tally, log)
        self._store = store
        self._process = ProcessMetrics(store.tally)
        self._renderer = Renderer()
        self._sources: dict[tuple[str, int], _Source] = {}
        self._due = 0.0
        self.keep_house()

    def exposition(self, theirs: bytes) -> bytes:
        """vLLM's text with ours; raises whatever keeps it from being whole."""
        self._store.commit()
        cores = list(find_cores())
        if not cores:
            return theirs
        parts: list[Part] = [scrape_part([("python_info", python_info(), 1.0)])]
        for core in cores:
            parts += self._source(VLLM_ENGINE, core.index, core).parts()
        for index in find_servers():
            parts += self._source(VLLM_API_SERVER, index).parts()
        return without_ours(theirs.decode()).encode() + self._renderer.render(parts, TEXT)

    def keep_house(self) -> None:
        """Bring this process's own figures up to date, once a second at most."""
        now = time.monotonic()
        if now >= self._due:
            self._due = now + PROCESS_INTERVAL_S
            with self.bulkhead.around("process"):
                self._process.update()
                self._store.commit()

    def _source(self, role: str, index: int, core: Core | None = None) -> _Source:
        known = self._sources.get((role, index))
        if known is None or known.core != core:
            known = self._sources[role, index] = _Source(role, index, core)
        return known


class _Source:
    """One process's tally, and its series."""

    def __init__(self, role: str, index: int, core: Core | None) -> None:
        self.core = core
        layout: Layout = server_layout() if core is None else core.facts.layout()
        process = f"{API_SERVER if core is None else ENGINE}-{index}"
        self._templates = [Template(layout, PROCESS_SCOPES, process=process, without=NOT_OF_PROCESSES)]
        if core is not None:
            model = core.facts.model_name
            self._templates.append(
                Template(layout, (Scope.ENGINE,), model_name=model, engine=index, without=NOT_OF_ENGINES)
            )
        self._reader = TallyReader(tally_path(directory(), role, index), layout)

    def parts(self) -> list[Part]:
        """Raises StoreError: an answer without them would have counters that fall."""
        reading = self._reader.read()
        return [template.part(reading.cells, reading.created_unix) for template in self._templates]
