"""The two applications of an API server: the public one, shared with the other API servers, and its own admin port.

Public: the OpenAI API, and what speaks of the whole deployment:

    /metrics   /metrics/engine/K   /metrics/processes   whole; an engine alone; processes that have no port of their own
    /metrics/engines                                    whole, also where --metrics-view makes the engines one there
    /metrics/pool                                       the engines as one, for load-aware routers
    /prometheus/targets                                 what to scrape in place of /metrics
    /health  /ping  /version  /load  /deployment

Admin: what speaks of this process (`/metrics`: with the engines that it exports, `/metrics/own`: without).
Each path is one `Route`. Neither knows sockets; `frontend.server` binds them.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from aiohttp import web

from engine.wire import Deployment, ServerConfig
from frontend import api
from frontend.connections import Connections, connection_limit, receiving
from frontend.context import REQUEST_ID_HEADER
from frontend.cors import Cors
from frontend.counters import OTHER, UNROUTED, HTTPAnswer
from frontend.deployment_view import DeploymentView
from frontend.errors import ApiError, EngineUnavailable, NotFound, Unauthorized, error_middleware
from frontend.routes import Handler, Route, mount, request_id, route_of, status_route
from frontend.scrape import OWN_PATH, PROCESSES_PATH, ScrapeRequest, scrape_request, targets
from frontend.services import Services
from metrics.catalogue import API_SERVER
from metrics.files import StoreError

MAX_BODY_BYTES: Final = 4 * 2**20
CLIENT_GONE: Final = 499  # no answer was seen; counted as 4xx
ORCA_REQUEST_HEADER: Final = "endpoint-load-metrics-format"
ORCA_RESPONSE_HEADER: Final = "endpoint-load-metrics"

Scraped = Callable[[Services, ScrapeRequest, web.Request], bytes | Awaitable[bytes]]


@dataclass(slots=True)
class State:
    """What the routes see. `services` is None until the facts are known."""

    config: ServerConfig
    view: DeploymentView
    services: Services | None = None
    is_draining: bool = False
    answered: asyncio.Event = field(default_factory=asyncio.Event)  # set while no request is open
    connections: Connections = field(init=False)
    admin_connections: Connections = field(init=False)
    _num_open: int = 0

    def __post_init__(self) -> None:
        self.answered.set()
        limit = connection_limit(self.config.http.max_connections)
        self.connections, self.admin_connections = Connections(limit), Connections(limit)

    def opened(self) -> None:
        """A request has come."""
        self._num_open += 1
        self.answered.clear()

    def closed(self) -> None:
        """It is over."""
        self._num_open -= 1
        if not self._num_open:
            self.answered.set()

    def refused(self, status: int) -> None:
        """Something was answered that is no request, or that nobody reads."""
        if self.services is not None:
            answer = HTTPAnswer(method=OTHER, handler=UNROUTED, status=status, seconds=0.0)
            self.services.record.answered(answer)
            self.services.group.soon()

    def ready(self) -> Services:
        """Raises EngineUnavailable while there is nothing to serve with."""
        if self.services is None:
            raise EngineUnavailable("the engine is starting, try again", code="starting")
        return self.services

    def table(self) -> Deployment:
        """Raises EngineUnavailable before the supervisor's first word."""
        if self.view.table is None:
            raise EngineUnavailable("the deployment is starting, try again", code="starting")
        return self.view.table


def public_app(state: State) -> web.Application:
    """What clients and scrapers of the deployment use."""
    http = state.config.http
    cors = Cors(
        origins=http.allowed_origins,
        methods=http.allowed_methods,
        headers=http.allowed_headers,
        allows_credentials=http.allow_credentials,
    )
    middlewares = [
        _http_metrics(state),
        error_middleware,
        _options(cors),
        _authentication(http.api_keys),
        receiving(state.connections, http.body_timeout_s),
    ]
    app = web.Application(middlewares=middlewares, client_max_size=MAX_BODY_BYTES)
    mount(app, [*api.routes(lambda: state.ready().openai), *StatusRoutes(state).public()])
    app.on_response_prepare.append(_load_report(state))
    app.on_response_prepare.append(_add_cors(cors))
    app.on_response_prepare.append(_add_request_id(http.enable_request_id_headers))
    return app


def admin_app(state: State) -> web.Application:
    """What speaks of this process."""
    receive = receiving(state.admin_connections, state.config.http.body_timeout_s)
    app = web.Application(middlewares=[error_middleware, receive])
    mount(app, StatusRoutes(state).admin())
    return app


class StatusRoutes:
    """Health, what runs, how much, and the metrics."""

    def __init__(self, state: State) -> None:
        self._state = state

    def public(self) -> list[Route]:
        """Those that speak of the deployment."""
        scraped = self._scraped
        whole = scraped(lambda services, asked, _: services.scrape.whole(asked))
        engine = scraped(lambda services, asked, http: services.scrape.engine(self._engine(http), asked))
        pool = scraped(lambda services, asked, _: asked.body(services.pool_exposition(asked.form)))
        return [
            *self._common(),
            status_route("/metrics", whole),
            status_route("/metrics/", whole),
            status_route("/metrics/engines", scraped(lambda services, asked, _: services.scrape.engines(asked))),
            status_route("/metrics/engine/{engine}", engine),
            status_route("/metrics/pool", pool),
            status_route(PROCESSES_PATH, scraped(lambda services, asked, _: services.scrape.processes(asked))),
            status_route("/prometheus/targets", self.targets),
        ]

    def admin(self) -> list[Route]:
        """Those that speak of this process."""
        exported = self._scraped(lambda services, asked, _: services.scrape.admin(asked))
        own = self._scraped(lambda services, asked, _: services.scrape.own(asked))
        return [
            *self._common(),
            status_route("/metrics", exported),
            status_route("/metrics/", exported),
            status_route(OWN_PATH, own),
        ]

    def _common(self) -> list[Route]:
        return [
            status_route("/health", self.health),
            status_route("/ping", self.health, "*"),
            status_route("/version", self.version),
            status_route("/deployment", self.deployment),
            status_route("/load", self.load),
        ]

    async def health(self, request: web.Request) -> web.Response:
        """200 while a request would find an engine."""
        if self._state.is_draining:
            raise EngineUnavailable("the API server ends, try again", code="stopping")
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

    def _scraped(self, body: Scraped) -> Handler:
        """Answers with series. What fails in making them is counted, and costs that one answer: `error_middleware`
        says and logs so."""

        async def answer(request: web.Request) -> web.Response:
            services = self._state.ready()
            asked = _asked(request)
            try:
                made = body(services, asked, request)
                return web.Response(body=made if isinstance(made, bytes) else await made, headers=asked.headers)
            except ApiError:
                raise
            except StoreError as error:
                services.record.fault("scrape")
                raise EngineUnavailable(f"a tally cannot be read: {error}", code="tally_unreadable") from error
            except Exception:
                services.record.fault("scrape")
                raise

        return answer

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
        if entry.pop("is_silent"):
            entry["state"] = "silent"
        if entry["role"] != API_SERVER or entry["index"] >= len(self._state.config.admin_addresses):
            return entry
        host, port = self._state.config.admin_addresses[entry["index"]]
        return entry | {"admin_url": f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"}

    def _exporters(self) -> list[dict[str, Any]]:
        views = [] if self._state.services is None else self._state.services.exporter.engines
        grants = [None if view.grant is None else asdict(view.grant) for view in views]
        return [{"engine": engine, "grant": grant} for engine, grant in enumerate(grants)]


def _asked(request: web.Request) -> ScrapeRequest:
    headers = request.headers
    accept, encoding = (",".join(headers.getall(name, [])) for name in ("Accept", "Accept-Encoding"))
    return scrape_request(accept, encoding, request.query.getall("name[]", []))


def _load_report(state: State) -> Any:
    """Adds the pool's figures to an answer of a model, where the request asks for them (ORCA)."""

    async def add(request: web.Request, response: web.StreamResponse) -> None:
        asked = request.headers.get(ORCA_REQUEST_HEADER)
        route, services = route_of(request), state.services
        if asked is None or route is None or not route.reports_load or services is None or response.status != 200:
            return
        report = services.load_report(asked)
        if report is not None:
            response.headers[ORCA_RESPONSE_HEADER] = report

    return add


def _add_cors(cors: Cors) -> Any:
    async def add(request: web.Request, response: web.StreamResponse) -> None:
        response.headers.extend(cors.of_answer(request.headers))

    return add


def _add_request_id(to_all: bool) -> Any:
    """Names the request in its answer, where the client has named it or the operator wants it."""

    async def add(request: web.Request, response: web.StreamResponse) -> None:
        if to_all or request.headers.get(REQUEST_ID_HEADER) == request_id(request):
            response.headers[REQUEST_ID_HEADER] = request_id(request)

    return add


def _options(cors: Cors) -> Any:
    """Answers OPTIONS of every path that there is, before a key is asked for: browsers send none with it."""

    @web.middleware
    async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
        unmatched = request.match_info.http_exception
        if request.method != "OPTIONS" or not isinstance(unmatched, web.HTTPMethodNotAllowed):
            return await handler(request)
        methods = ", ".join(sorted(unmatched.allowed_methods))
        return web.Response(status=204, headers={"Allow": methods, **cors.of_preflight(request.headers, methods)})

    return answer


def _version() -> str:
    try:
        return version("wholebatch")
    except PackageNotFoundError:
        return "unknown"  # run from a checkout that is not installed


def _authentication(api_keys: tuple[str, ...]) -> Any:
    """Guards the routes that need a key, where there are keys, and says nothing of what is not there below /v1."""
    keys = [key.encode() for key in api_keys]

    @web.middleware
    async def authenticate(request: web.Request, handler: Handler) -> web.StreamResponse:
        route = route_of(request)
        needs_key = request.path.startswith("/v1") if route is None else route.needs_key
        if keys and needs_key and not _is_authorized(request, keys):
            raise Unauthorized(
                "no API key, or a wrong one, in the Authorization or x-api-key header", code="invalid_api_key"
            )
        return await handler(request)

    return authenticate


def _is_authorized(request: web.Request, keys: list[bytes]) -> bool:
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    bearer = given if scheme.lower() == "bearer" else ""
    shown = (bearer, request.headers.get("x-api-key", ""))  # Anthropic's clients send the second
    tokens = [token.strip().encode("utf-8", "surrogateescape") for token in shown]
    # Every key is compared, each in constant time: how long it takes says nothing about which one nearly fits.
    return sum(hmac.compare_digest(token, key) for token in tokens for key in keys) > 0


def _http_metrics(state: State) -> Any:
    """Counts every answer but those about status, by its route's label. Outermost: it sees what the client sees."""

    @web.middleware
    async def observe(request: web.Request, handler: Handler) -> web.StreamResponse:
        route = route_of(request)
        label = UNROUTED if route is None else route.label
        if label is None:
            return await handler(request)
        started_at = time.monotonic()
        status, num_bytes = CLIENT_GONE, None
        state.opened()
        try:
            response = await handler(request)
            status, num_bytes = response.status, response.content_length
        finally:
            state.closed()
            services = state.services
            if services is not None:
                answer = HTTPAnswer(
                    method=request.method,
                    handler=label,
                    status=status,
                    seconds=time.monotonic() - started_at,
                    num_request_bytes=request.content_length or 0,
                    num_response_bytes=num_bytes or 0,
                )
                services.record.answered(answer)
                services.group.soon()
        if services is not None and not response.prepared:
            await services.group.committed()  # P4: counted before it is seen
        return response

    return observe
