"""Work that ends when its client leaves, and server-sent events on top of it."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
DONE = "data: [DONE]\n\n"

T = TypeVar("T")


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> tuple[bool, T | None]:
    """(True, result of ``work``); or (False, None) when the client leaves first, and the work is cancelled.

    The request's body must have been read. Whatever ``work`` raises is raised.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        return (True, await task) if task.done() else (False, None)
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.wait({task, watch})


def event(content: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(content)}\n\n"


class EventStream(StreamingResponse):
    """A stream of events; ``on_close`` is called exactly once, with whether the client stayed to the end.

    It watches for the disconnect itself, since servers differ in whether they report one while sending.
    """

    def __init__(self, events: AsyncIterator[str], on_close: Callable[[bool], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=HEADERS)
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stayed = False
        try:
            stayed, _ = await unless_disconnected(receive, self.stream_response(send))
        finally:
            self._on_close(stayed)
