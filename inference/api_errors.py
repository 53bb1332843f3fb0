"""Every failure as an OpenAI error object."""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from conf.errors import SundogError
from inference.engine import PromptTooLong
from inference.protocol import Unsupported
from inference.runner import Closed, QueueFull

log = logging.getLogger(__name__)


class ApiError(Exception):
    """An answer other than 200 that a handler decides on."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers


def error_object(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an error answer."""
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")
    kind = "server_error" if status >= 500 else kind
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: ApiError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An ``ApiError`` as a response."""
    content = error_object(error.status, error.message, error.param, error.code)
    return JSONResponse(content, error.status, headers or error.headers)


def as_api_error(error: BaseException) -> ApiError:
    """What the client is told about any exception; details of bugs go to the log only."""
    match error:
        case ApiError():
            return error
        case Closed():
            return ApiError(503, str(error), code="shutting_down", headers={"Retry-After": str(error.retry_sec)})
        case QueueFull():
            message = f"the server is full: {error}; try again later"
            return ApiError(429, message, code="queue_full", headers={"Retry-After": str(error.retry_sec)})
        case Unsupported():
            return ApiError(400, str(error), error.field, "unsupported_parameter")
        case SundogError():
            code = "context_length_exceeded" if isinstance(error, PromptTooLong) else None
            return ApiError(400, f"{error.field}: {error.value} {error.rule}".strip(), error.field, code)
        case TimeoutError():
            return ApiError(503, "the model did not answer in time", code="timeout")
        case HTTPException():
            return ApiError(error.status_code, str(error.detail), headers=error.headers)
        case _:
            return ApiError(500, "the server failed on this request; its log says why", code="internal_error")


def install_handlers(app: FastAPI) -> None:
    """Answer every exception of ``app`` with an error object."""

    async def known(_: Request, error: Exception) -> JSONResponse:
        return error_response(as_api_error(error))

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        place = [str(part) for part in first["loc"] if part != "body"]
        message = f"{'.'.join(place)}: {first['msg']}" if place else str(first["msg"])
        return error_response(ApiError(400, message, place[0] if place else None))

    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        log.error("request %s failed", request.url.path, exc_info=error)
        return error_response(as_api_error(error))

    for kind in (ApiError, QueueFull, Unsupported, SundogError, TimeoutError, HTTPException):
        app.add_exception_handler(kind, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, unexpected)
