"""The table of routes: what an application serves is what it says, and the middlewares go by it."""

from __future__ import annotations

from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from frontend.api import OpenAIService, routes
from frontend.counters import UNROUTED
from frontend.routes import Route, mount, route_of, status_route
from metrics.catalogue import HANDLERS


async def hello(request: web.Request) -> web.Response:
    route = route_of(request)
    assert route is not None
    return web.Response(text=route.path)


@web.middleware
async def naming(request: web.Request, handler: Any) -> web.StreamResponse:
    """Says in a header which entry a request was for."""
    route = route_of(request)
    try:
        response: web.StreamResponse = await handler(request)
    except web.HTTPException as error:
        response = web.Response(status=error.status)
    response.headers["Route"] = "none" if route is None else route.path
    return response


async def test_a_request_finds_its_entry_by_template_and_method_and_none_where_there_is_none():
    app = web.Application(middlewares=[naming])
    mount(
        app,
        [
            status_route("/plain", hello),
            status_route("/of/{name:.+}", hello),
            status_route("/any", hello, "*"),
            status_route("/made", hello, "POST"),
            status_route("/made", hello, "PUT"),
        ],
    )
    async with TestClient(TestServer(app)) as http:
        for method, path, status, entry in (
            ("GET", "/plain", 200, "/plain"),
            ("HEAD", "/plain", 200, "/plain"),
            ("GET", "/of/a/b", 200, "/of/{name:.+}"),
            ("DELETE", "/any", 200, "/any"),
            ("POST", "/made", 200, "/made"),
            ("PUT", "/made", 200, "/made"),
            ("GET", "/made", 405, "none"),
            ("GET", "/nothing", 404, "none"),
        ):
            async with http.request(method, path) as answer:
                assert (answer.status, answer.headers["Route"]) == (status, entry), (method, path)


def test_a_label_that_the_catalogue_does_not_know_is_refused_at_the_start():
    with pytest.raises(ValueError, match="the catalogue has no handler '/v2/new'"):
        mount(web.Application(), [Route(path="/v2/new", handler=hello, label="/v2/new", needs_key=True)])


def test_every_route_of_the_model_needs_a_key_and_is_counted_and_every_label_has_a_route():
    def nothing() -> OpenAIService:
        raise AssertionError("not asked")

    of_model = routes(nothing)
    assert all(route.needs_key and route.label is not None for route in of_model)
    assert {route.label for route in of_model} | {UNROUTED} == set(HANDLERS)
    assert {route.operation for route in of_model if route.reports_load} == {"text_completion", "chat"}


async def test_two_methods_of_one_path_keep_their_own_entries():
    app = web.Application(middlewares=[naming])
    open_one = Route(path="/thing", handler=hello, method="DELETE", label=None, needs_key=False)
    guarded = Route(path="/thing", handler=hello, label=None, needs_key=True)
    found: list[bool] = []

    @web.middleware
    async def look(request: web.Request, handler: Any) -> web.StreamResponse:
        route = route_of(request)
        assert route is not None
        found.append(route.needs_key)
        response: web.StreamResponse = await handler(request)
        return response

    app.middlewares.append(look)
    mount(app, [guarded, open_one])
    async with TestClient(TestServer(app)) as http:
        for method in ("GET", "HEAD", "DELETE"):
            async with http.request(method, "/thing") as answer:
                assert answer.status == 200
    assert found == [True, True, False]
