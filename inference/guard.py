"""What happens to a request before the application sees it: its id, the token, a full queue, the bound on its body."""

import asyncio
import hmac
import re
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inference.api_errors import ApiError, as_api_error, error_response
from inference.runner import QueueFull

OPEN_PATHS = ("/health", "/ready", "/")  # need no token
WORK = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings")
REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
BODY_TIMEOUT_SEC = 60.0


class Guard:
    """ASGI middleware. It reads the body itself, so that an oversized one is never held in memory.

    ``admit`` raises QueueFull where work would be in vain, before its body is read.
    """

    def __init__(self, app: ASGIApp, token: str, max_body_bytes: int, admit: Callable[[], None]) -> None:
        self.app, self.max_body_bytes, self._admit = app, max_body_bytes, admit
        self._expected = f"Bearer {token}".encode() if token else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        sent_id = headers.get("x-request-id", "")
        request_id = sent_id if REQUEST_ID.fullmatch(sent_id) else uuid.uuid4().hex

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            self._authorise(scope["path"], headers)
            if scope["path"] in WORK and scope["method"] == "POST":
                self._admit()
            body = await self._body(headers, receive)
        except (ApiError, QueueFull) as error:
            found = as_api_error(error)
            extra = {"WWW-Authenticate": "Bearer"} if found.status == 401 else None
            await error_response(found, extra)(scope, receive, send_with_id)
            return
        if body is not None:
            await self.app(scope, _replay(body, receive), send_with_id)

    def _authorise(self, path: str, headers: Headers) -> None:
        if self._expected is None or path in OPEN_PATHS:
            return
        given = headers.get("authorization", "").encode("latin-1")
        if not hmac.compare_digest(given, self._expected):
            raise ApiError(401, "a valid bearer token is needed", code="invalid_api_key")

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        """The whole body; None when the client left. Raises ApiError 413 and 408."""
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > self.max_body_bytes:
            raise self._too_large()
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(BODY_TIMEOUT_SEC):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self.max_body_bytes:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {BODY_TIMEOUT_SEC:.0f} s") from None

    def _too_large(self) -> ApiError:
        message = f"the body is larger than this server takes ({self.max_body_bytes} bytes)"
        return ApiError(413, message, code="request_too_large")


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receive channel that gives the body once and then what comes after it (the disconnect)."""
    pending = [body]

    async def replay() -> Message:
        if pending:
            return {"type": "http.request", "body": pending.pop(), "more_body": False}
        return await receive()

    return replay
