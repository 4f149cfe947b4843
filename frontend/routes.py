"""What an API server answers: one entry for each path, and all that the server does around its handler.

An endpoint is an entry here-shaped, in the list of the wing that has its handler, and nothing else: the middlewares
ask the entry.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Final

from aiohttp import web

from metrics.catalogue import HANDLERS

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One path of an application."""

    path: str  # as aiohttp writes it, with {names}
    handler: Handler
    method: str = "GET"  # GET answers HEAD, too; `*`: any
    label: str | None = None  # in HTTP metrics, one of the catalogue's HANDLERS; None: such answers are not counted
    operation: str = ""  # of a request to the model, as traces name it
    needs_key: bool = False  # where the operator has set API keys
    reports_load: bool = False  # in a header of its answer, where the request asks for it


_ROUTES: Final = web.AppKey("routes", dict[str, Route])


def mount(app: web.Application, routes: Iterable[Route]) -> None:
    """Serve these, and no others."""
    app[_ROUTES] = {}
    for route in routes:
        assert route.label is None or route.label in HANDLERS, f"{route.path}: the catalogue has no {route.label!r}"
        if route.method == "GET":
            resource = app.router.add_get(route.path, route.handler).resource
        else:
            resource = app.router.add_route(route.method, route.path, route.handler).resource
        assert resource is not None, f"{route.path} has no resource"
        app[_ROUTES][resource.canonical] = route


def route_of(request: web.Request) -> Route | None:
    """The entry that this request is for; None where there is none, or not with this method."""
    resource = request.match_info.route.resource
    return None if resource is None else request.app[_ROUTES].get(resource.canonical)
