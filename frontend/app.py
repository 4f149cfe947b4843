"""The two applications of an API server: the public one, shared with the other API servers, and its own admin port.

Public: the OpenAI API, and what speaks of the whole deployment:

    /metrics   /metrics/engine/K   /metrics/processes   whole; an engine alone; processes that have no port of their own
    /metrics/engines                                    whole, also where --metrics-view makes the engines one there
    /metrics/pool                                       the engines as one, for load-aware routers
    /prometheus/targets                                 what to scrape in place of /metrics
    /health  /ping  /version  /load  /deployment

Admin: what speaks of this process (`/metrics`: with the engines that it exports, `/metrics/own`: without).
Neither knows sockets; `frontend.server` binds them.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from aiohttp import web

from engine.wire import Deployment, ServerConfig
from frontend import tracing
from frontend.api import add_routes
from frontend.counters import HTTPAnswer
from frontend.deployment_view import DeploymentView
from frontend.errors import EngineUnavailable, NotFound, Unauthorized, error_middleware
from frontend.scrape import OWN_PATH, PROCESSES_PATH, ScrapeRequest, scrape_request, targets
from frontend.serving import Serving
from metrics.catalogue import API_SERVER

MAX_BODY_BYTES: Final = 4 * 2**20
CLIENT_GONE: Final = 499  # no answer was seen; counted as 4xx
STATUS_ROUTES: Final = (  # not in HTTP metrics
    "/metrics",
    "/health",
    "/ping",
    "/load",
    "/version",
    "/deployment",
    "/prometheus/",
)
ORCA_REQUEST_HEADER: Final = "endpoint-load-metrics-format"
ORCA_RESPONSE_HEADER: Final = "endpoint-load-metrics"
ORCA_ROUTES: Final = ("/v1/completions", "/v1/chat/completions")
TEMPLATES: Final = {"/v1/models/{name}": "/v1/models"}  # routes that share a label

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(slots=True)
class State:
    """What the routes see. `serving` is None until the facts are known."""

    config: ServerConfig
    view: DeploymentView
    serving: Serving | None = None

    def ready(self) -> Serving:
        """Raises EngineUnavailable while there is nothing to serve with."""
        if self.serving is None:
            raise EngineUnavailable("the engine is starting, try again", code="starting")
        return self.serving

    def table(self) -> Deployment:
        """Raises EngineUnavailable before the supervisor's first word."""
        if self.view.table is None:
            raise EngineUnavailable("the deployment is starting, try again", code="starting")
        return self.view.table


def public_app(state: State) -> web.Application:
    """What clients and scrapers of the deployment use."""
    middlewares = [_http_metrics(state), error_middleware, _authentication(state.config.http.api_keys)]
    if state.config.stats.is_traced:
        middlewares.append(tracing.middleware)
    app = web.Application(middlewares=middlewares, client_max_size=MAX_BODY_BYTES)
    add_routes(app, lambda: state.ready().openai)
    routes = StatusRoutes(state)
    routes.add_to(app)
    app.router.add_get("/metrics", routes.metrics)
    app.router.add_get("/metrics/engine/{engine}", routes.engine_metrics)
    app.router.add_get("/metrics/engines", routes.engines_metrics)
    app.router.add_get("/metrics/pool", routes.pool_metrics)
    app.router.add_get(PROCESSES_PATH, routes.process_metrics)
    app.router.add_get("/prometheus/targets", routes.targets)
    app.on_response_prepare.append(_load_report(state))
    return app


def admin_app(state: State) -> web.Application:
    """What speaks of this process."""
    app = web.Application(middlewares=[error_middleware])
    routes = StatusRoutes(state)
    routes.add_to(app)
    app.router.add_get("/metrics", routes.admin_metrics)
    app.router.add_get(OWN_PATH, routes.own_metrics)
    return app


class StatusRoutes:
    """Health, what runs, how much, and the metrics."""

    def __init__(self, state: State) -> None:
        self._state = state

    def add_to(self, app: web.Application) -> None:
        """The routes that both applications have."""
        app.router.add_get("/health", self.health)
        app.router.add_route("*", "/ping", self.health)
        app.router.add_get("/version", self.version)
        app.router.add_get("/deployment", self.deployment)
        app.router.add_get("/load", self.load)

    async def health(self, request: web.Request) -> web.Response:
        """200 while a request would find an engine."""
        if not self._state.ready().clients.has_ready_engine:
            raise EngineUnavailable("no engine is ready, try again", code="engine_unavailable")
        return web.Response()

    async def version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": _version()})

    async def deployment(self, request: web.Request) -> web.Response:
        """Every process, and who exports each engine's series."""
        table = self._state.table()
        body = {
            "version": table.version,
            "facts": None if table.facts is None else asdict(table.facts),
            "processes": [self._process(asdict(entry)) for entry in table.processes],
            "exporters": self._exporters(),
        }
        return web.json_response(body)

    async def load(self, request: web.Request) -> web.Response:
        """Sequences that the whole deployment's API servers wait for; the same from any of them."""
        return web.json_response({"server_load": int(self._state.ready().scrape.in_flight().num_sequences)})

    async def metrics(self, request: web.Request) -> web.Response:
        """The whole deployment's."""
        serving = self._state.ready()
        with _bulkhead(serving):
            asked = _asked(request)
            return _exposition(await serving.scrape.whole(asked), asked)

    async def engines_metrics(self, request: web.Request) -> web.Response:
        """The whole deployment's with each engine's own queue and cache, whatever --metrics-view is."""
        serving = self._state.ready()
        with _bulkhead(serving):
            asked = _asked(request)
            return _exposition(await serving.scrape.engines(asked), asked)

    async def engine_metrics(self, request: web.Request) -> web.Response:
        """One engine's series alone."""
        serving, engine = self._state.ready(), self._engine(request)
        with _bulkhead(serving):
            asked = _asked(request)
            return _exposition(await serving.scrape.engine(engine, asked), asked)

    async def pool_metrics(self, request: web.Request) -> web.Response:
        """The engines as one, for routers."""
        serving = self._state.ready()
        with _bulkhead(serving):
            asked = _asked(request)
            return _exposition(asked.body(serving.pool.exposition(serving.pool_figures(), asked.form)), asked)

    async def process_metrics(self, request: web.Request) -> web.Response:
        """The process series of engines and the supervisor."""
        serving = self._state.ready()
        with _bulkhead(serving):
            asked = _asked(request)
            return _exposition(serving.scrape.processes(asked), asked)

    async def admin_metrics(self, request: web.Request) -> web.Response:
        """This process's, and those of the engines that it exports."""
        serving = self._state.ready()
        with _bulkhead(serving):
            asked = _asked(request)
            return _exposition(serving.scrape.admin(asked), asked)

    async def own_metrics(self, request: web.Request) -> web.Response:
        """This process's alone."""
        serving = self._state.ready()
        with _bulkhead(serving):
            asked = _asked(request)
            return _exposition(serving.scrape.own(asked), asked)

    async def targets(self, request: web.Request) -> web.Response:
        """What Prometheus is to scrape in place of the public port's /metrics."""
        return web.json_response(targets(self._state.config, request.headers.get("Host", "")))

    def _engine(self, request: web.Request) -> int:
        text = request.match_info["engine"]
        num_engines = self._state.config.num_engines
        if not (text.isascii() and text.isdigit() and len(text) < 6 and int(text) < num_engines):
            raise NotFound(f"no such engine: {text[:40]!r}, there are {num_engines}")
        return int(text)

    def _process(self, entry: dict[str, Any]) -> dict[str, Any]:
        if entry["role"] != API_SERVER or entry["index"] >= len(self._state.config.admin_addresses):
            return entry
        host, port = self._state.config.admin_addresses[entry["index"]]
        return entry | {"admin_url": f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"}

    def _exporters(self) -> list[dict[str, Any]]:
        views = [] if self._state.serving is None else self._state.serving.exporter.engines
        grants = [None if view.grant is None else asdict(view.grant) for view in views]
        return [{"engine": engine, "grant": grant} for engine, grant in enumerate(grants)]


@contextmanager
def _bulkhead(serving: Serving) -> Iterator[None]:
    """A scrape that fails is counted, and costs that one answer: `error_middleware` says and logs so."""
    try:
        yield
    except Exception:
        serving.record.fault("scrape")
        raise


def _exposition(body: bytes, asked: ScrapeRequest) -> web.Response:
    return web.Response(body=body, headers=asked.headers)


def _asked(request: web.Request) -> ScrapeRequest:
    headers = request.headers
    accept, encoding = (",".join(headers.getall(name, [])) for name in ("Accept", "Accept-Encoding"))
    return scrape_request(accept, encoding, request.query.getall("name[]", []))


def _load_report(state: State) -> Any:
    """Adds the pool's figures to an answer of a model, where the request asks for them (ORCA)."""

    async def add(request: web.Request, response: web.StreamResponse) -> None:
        asked = request.headers.get(ORCA_REQUEST_HEADER)
        serving = state.serving
        if asked is None or serving is None or response.status != 200 or request.path not in ORCA_ROUTES:
            return
        report = serving.load_report(asked)
        if report is not None:
            response.headers[ORCA_RESPONSE_HEADER] = report

    return add


def _version() -> str:
    try:
        return version("wholebatch")
    except PackageNotFoundError:
        return "unknown"  # run from a checkout that is not installed


def _authentication(api_keys: tuple[str, ...]) -> Any:
    """Guards /v1 where there are keys; health and metrics stay open."""
    keys = [key.encode() for key in api_keys]

    @web.middleware
    async def authenticate(request: web.Request, handler: Handler) -> web.StreamResponse:
        if keys and request.path.startswith("/v1") and not _is_authorized(request, keys):
            raise Unauthorized("no API key, or a wrong one, in the Authorization header", code="invalid_api_key")
        return await handler(request)

    return authenticate


def _is_authorized(request: web.Request, keys: list[bytes]) -> bool:
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    token = given.strip().encode("utf-8", "surrogateescape")
    # Every key is compared, each in constant time: how long it takes says nothing about which one nearly fits.
    num_equal = sum(hmac.compare_digest(token, key) for key in keys)
    return num_equal > 0 and scheme.lower() == "bearer"


def _http_metrics(state: State) -> Any:
    """Counts every answer but those about status, by route template. Outermost: it sees what the client sees."""

    @web.middleware
    async def observe(request: web.Request, handler: Handler) -> web.StreamResponse:
        template = _template(request)
        if template.startswith(STATUS_ROUTES):
            return await handler(request)
        started_at = time.monotonic()
        status, num_bytes = CLIENT_GONE, None
        try:
            response = await handler(request)
            status, num_bytes = response.status, response.content_length
        finally:
            serving = state.serving
            if serving is not None:
                answer = HTTPAnswer(
                    method=request.method,
                    handler=template,
                    status=status,
                    seconds=time.monotonic() - started_at,
                    num_request_bytes=request.content_length or 0,
                    num_response_bytes=num_bytes or 0,
                )
                serving.record.answered(answer)
                serving.group.soon()
        if serving is not None and not response.prepared:
            await serving.group.committed()  # P4: counted before it is seen
        return response

    return observe


def _template(request: web.Request) -> str:
    resource = request.match_info.route.resource
    template = "other" if resource is None else resource.canonical
    return TEMPLATES.get(template, template)
