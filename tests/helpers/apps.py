"""A tiny ASGI application for the tests of serving."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import StreamingResponse

from conf.errors import DataError


def build_app(model: str, settings: dict[str, Any]) -> FastAPI:
    """Routes for a plain answer, a refusal, a stream that waits for its reader, and one that notes a disconnect."""
    app = FastAPI()
    gates: dict[str, asyncio.Event] = {}

    @app.get("/settings")
    async def show() -> dict[str, Any]:
        return {"model": model, "port": settings["port"], "token": os.environ.get("SUNDOG_API_TOKEN", "")}

    @app.get("/busy")
    async def busy() -> Response:
        return Response("full", 429, {"Retry-After": "1"})

    @app.get("/stream/{name}")
    async def stream(name: str) -> StreamingResponse:
        gates[name] = asyncio.Event()

        async def events() -> AsyncIterator[str]:
            yield "data: first\n\n"
            await asyncio.wait_for(gates[name].wait(), 60)
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    @app.get("/open/{name}")
    async def open_gate(name: str) -> dict[str, bool]:
        gates[name].set()
        return {"open": True}

    @app.get("/endless")
    async def endless(note: str) -> StreamingResponse:
        async def events() -> AsyncIterator[str]:
            try:
                while True:
                    yield "data: again\n\n"
                    await asyncio.sleep(0.02)
            finally:
                Path(note).touch()

        return StreamingResponse(events(), media_type="text/event-stream")

    return app


def refuse(model: str, settings: dict[str, Any]) -> FastAPI:
    raise DataError("serve.model", model, "it must have weights", "sundog export")


def crash(model: str, settings: dict[str, Any]) -> FastAPI:
    raise KeyError("no such layer")
