"""Every error over HTTP: one shape, honest statuses."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from frontend.errors import (
    ApiError,
    BadRequest,
    EngineLost,
    EngineUnavailable,
    GenerationFailed,
    NotFound,
    TooManyRequests,
    Unauthorized,
    error_body,
    error_middleware,
)

STATUSES: list[tuple[ApiError, int]] = [
    (BadRequest("m", param="p", code="c"), 400),
    (Unauthorized("m"), 401),
    (NotFound("m"), 404),
    (TooManyRequests("m"), 429),
    (EngineUnavailable("m"), 503),
    (EngineLost("m"), 503),
    (GenerationFailed("m"), 503),
    (ApiError("m"), 500),
]


@asynccontextmanager
async def client(error: BaseException | None = None) -> AsyncIterator[TestClient[web.Request, web.Application]]:
    async def raises(request: web.Request) -> web.Response:
        if error is not None:
            raise error
        return web.json_response(len(await request.read()))

    app = web.Application(middlewares=[error_middleware], client_max_size=1000)
    app.router.add_post("/raises", raises)
    async with TestClient(TestServer(app)) as made:
        yield made


@pytest.mark.parametrize(("error", "status"), STATUSES, ids=lambda value: type(value).__name__)
async def test_an_error_has_its_status_and_the_one_shape(error: ApiError, status: int):
    async with client(error) as http:
        answer = await http.post("/raises")
        assert answer.status == status
        assert await answer.json() == error_body(error)
        assert set((await answer.json())["error"]) == {"message", "type", "param", "code"}


async def test_clients_are_told_to_come_back():
    async with client(EngineUnavailable("m")) as http:
        assert (await http.post("/raises")).headers["Retry-After"] == "1"


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/raises", 405), ("POST", "/nothing", 404), ("DELETE", "/raises", 405)]
)
async def test_the_routers_own_errors_have_the_same_shape(method: str, path: str, status: int):
    async with client() as http:
        answer = await http.request(method, path)
        assert answer.status == status
        error = (await answer.json())["error"]
        assert error["type"] == "invalid_request_error"
        assert f"{method} {path}" in error["message"]


async def test_a_body_too_large_is_refused_in_the_same_shape():
    async with client() as http:
        answer = await http.post("/raises", data=b"x" * 5000)
        assert answer.status == 413
        assert "too large" in (await answer.json())["error"]["message"]


@pytest.fixture
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("quiet")
async def test_a_fault_of_ours_tells_nothing_of_its_inside():
    async with client(KeyError("secret")) as http:
        answer = await http.post("/raises")
        assert answer.status == 500
        assert "secret" not in await answer.text()
        assert (await answer.json())["error"]["code"] == "internal_error"


async def test_a_redirect_is_no_error():
    async with client(web.HTTPFound("/elsewhere")) as http:
        assert (await http.post("/raises", allow_redirects=False)).status == 302


async def test_what_ends_the_handler_is_not_answered():
    for error in (ConnectionResetError(), asyncio.CancelledError()):

        async def handler(request: web.Request, error: BaseException = error) -> web.StreamResponse:
            raise error

        with pytest.raises(type(error)):
            await error_middleware(None, handler)  # type: ignore[arg-type]
