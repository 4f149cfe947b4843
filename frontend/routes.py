"""What an API server answers: one entry for each endpoint, and all that the server does around its handler.

Each wing lists its own. Adding an endpoint is one `Route` in such a list, and its handler: the middlewares ask the
entry for the label of its counters, the key it needs, the operation that traces name.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Final

from aiohttp import web

from frontend.context import REQUEST_ID_HEADER, is_request_id
from metrics.catalogue import HANDLERS

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One endpoint of an application. What must not be forgotten has no default."""

    path: str  # as aiohttp writes it, with {names}
    handler: Handler
    method: str = "GET"  # GET answers HEAD, too; `*`: any
    label: str | None  # in HTTP metrics, one of the catalogue's HANDLERS; None: such answers are not counted
    needs_key: bool  # where the operator has set API keys
    operation: str = ""  # of a request to the model, as traces name it
    reports_load: bool = False  # in a header of its answer, where the request asks for it


def status_route(path: str, handler: Handler, method: str = "GET") -> Route:
    """An endpoint that speaks of the server: open, and not counted."""
    return Route(path=path, handler=handler, method=method, label=None, needs_key=False)


_ROUTES: Final = web.AppKey("routes", dict[web.AbstractRoute, Route])


def mount(app: web.Application, routes: Iterable[Route]) -> None:
    """Serve these, and no others. Raises ValueError for a label that the catalogue does not have."""
    app[_ROUTES] = {}
    for route in routes:
        if route.label is not None and route.label not in HANDLERS:
            raise ValueError(f"{route.path}: the catalogue has no handler {route.label!r}")
        for method in ("GET", "HEAD") if route.method == "GET" else (route.method,):
            app[_ROUTES][app.router.add_route(method, route.path, route.handler)] = route


def route_of(request: web.Request) -> Route | None:
    """The entry that this request is for; None where there is none, or not with this method."""
    return request.app[_ROUTES].get(request.match_info.route)


_REQUEST_ID: Final = web.RequestKey("request_id", str)


def request_id(request: web.Request) -> str:
    """The client's own, as vLLM takes it, or else one that is made up once for each request."""
    if _REQUEST_ID not in request:
        given = request.headers.get(REQUEST_ID_HEADER, "")
        request[_REQUEST_ID] = given if is_request_id(given) else uuid.uuid4().hex
    return request[_REQUEST_ID]
