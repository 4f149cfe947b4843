"""Every error a client can meet, and how it looks over HTTP: OpenAI's shape, one table of statuses.

Code that finds a fault raises one of these; nobody else builds an error answer. `error_middleware` also gives this
shape to aiohttp's own errors (no such route, wrong method, body too large). In a stream whose headers are out,
`error_body` is sent as an event instead.
"""

# ruff: noqa: N818  named as HTTP names its statuses
from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar

from aiohttp import web

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ApiError(Exception):
    """What the client is told. `param` names the request's field at fault, `code` is for programs."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    headers: ClassVar[dict[str, str]] = {}

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class BadRequest(ApiError):
    """The request cannot be served as it is."""

    status = 400
    type = "invalid_request_error"


class Unauthorized(ApiError):
    """No API key, or a wrong one."""

    status = 401
    type = "invalid_request_error"
    headers: ClassVar[dict[str, str]] = {"WWW-Authenticate": "Bearer"}


class NotFound(ApiError):
    """No such model."""

    status = 404
    type = "invalid_request_error"


class RequestTimeout(ApiError):
    """The request did not come in time."""

    status = 408
    type = "invalid_request_error"
    headers: ClassVar[dict[str, str]] = {"Connection": "close"}


class UnsupportedMediaType(ApiError):
    """The body is not in a form that the server reads."""

    status = 415
    type = "invalid_request_error"


class ExpectationFailed(ApiError):
    """The request expects what the server does not do."""

    status = 417
    type = "invalid_request_error"


class HeadTooLarge(ApiError):
    """A line of the request's head is too long."""

    status = 431
    type = "invalid_request_error"


class TooManyRequests(ApiError):
    """Refused at the door: the engine takes no more messages."""

    status = 429
    type = "rate_limit_error"
    headers: ClassVar[dict[str, str]] = {"Retry-After": "1"}


class EngineUnavailable(ApiError):
    """No engine is ready to take the request."""

    status = 503
    type = "service_unavailable_error"
    headers: ClassVar[dict[str, str]] = {"Retry-After": "1"}


class Overloaded(EngineUnavailable):
    """Refused at the door: the deployment's queue has reached a limit of the operator's."""


class EngineLost(EngineUnavailable):
    """The engine that worked on the request ended, or lost it."""


class GenerationFailed(ApiError):
    """The engine gave the request up, with a reason of its own (the KV cache cannot hold it)."""

    status = 503


def error_body(error: ApiError) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def error_response(error: ApiError) -> web.Response:
    """The error as a whole HTTP answer."""
    return web.json_response(error_body(error), status=error.status, headers=error.headers)


def _from_http(error: web.HTTPException, request: web.Request) -> web.Response:
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        message = f"the request's body is too large: {error.text}"
    else:
        message = f"{error.reason}: {request.method} {request.path}"
    body = {"error": {"message": message, "type": kind, "param": None, "code": None}}
    kept = {name: value for name, value in error.headers.items() if name in ("Allow", "Retry-After", "Location")}
    return web.json_response(body, status=error.status, headers=kept)


@web.middleware
async def error_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Makes whatever is raised inside an answer in the one shape."""
    try:
        return await handler(request)
    except ApiError as error:
        return error_response(error)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return _from_http(error, request)
    except ConnectionError:
        raise  # the client is gone: there is nobody to answer
    except Exception:  # the bulkhead between one request's fault and the server
        log.exception("event=request_failed method=%s path=%s", request.method, request.path)
        return error_response(ApiError("internal error", code="internal_error"))
