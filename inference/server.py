"""The OpenAI-compatible HTTP application."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import FileResponse, JSONResponse
from starlette.responses import Response as HttpResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from conf.errors import ConfigError
from conf.serving import EngineConfig, ServeConfig
from inference.api import Api
from inference.api_errors import install_handlers
from inference.chat import ChatTemplate
from inference.engine import Engine
from inference.guard import Guard
from inference.metrics import Metrics
from inference.openapi import BUSY, ERRORS, GENERATED, METRICS_ANSWER, PAGE_ANSWER, STOPPED, publish
from inference.protocol import ChatRequest, CompletionRequest, EmbeddingsRequest, ModelCard
from inference.runner import Runner

TOKEN_VARIABLE = "SUNDOG_API_TOKEN"
AT_LEAST = {"max_concurrent": 1, "max_queue": 0, "max_queue_tokens": 1, "max_body_bytes": 1, "max_tokens": 1}
PAGE_POLICY = "default-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
PAGE = Path(__file__).with_name("page.html")


def build_app(model: str, settings: dict[str, Any]) -> FastAPI:
    """The application that serves one model folder.

    Args:
        model: a Hugging Face folder with a tokenizer, or a GGUF file.
        settings: fields of ``ServeConfig``; absent ones have their defaults. Without ``model_name`` the model is
            called as its folder.

    The bearer token is read from SUNDOG_API_TOKEN now; without it every request is let in. ``app.state.runner`` is
    the ``Runner``, ``app.state.healthy()`` whether it can go on.

    Raises:
        ConfigError: unknown settings or values out of range.
        DataError: the folder cannot be read.
    """
    config = read_settings(model, settings)
    engine = Engine(model, config.engine, config.max_concurrent)
    runner = Runner(engine, config.max_queue, config.max_queue_tokens)
    metrics = Metrics(runner)
    api = Api(runner, ChatTemplate(engine.folder), metrics, config)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        api.draining = True
        await asyncio.to_thread(runner.wait_idle, config.drain_sec)
        runner.close()

    app = FastAPI(title="Sundog", lifespan=lifespan, docs_url=None, redoc_url=None, responses=ERRORS)
    publish(app)
    app.state.runner = runner
    app.state.healthy = lambda: runner.healthy or api.draining
    install_handlers(app)
    token = os.environ.get(TOKEN_VARIABLE, "")
    app.add_middleware(Guard, token=token, max_body_bytes=config.max_body_bytes, admit=api.admit)
    app.add_middleware(CountAnswers, metrics=metrics)
    _add_routes(app, api, _model_card(engine, config))
    return app


def read_settings(model: str, settings: dict[str, Any]) -> ServeConfig:
    """``ServeConfig`` from a dict. Raises ConfigError for unknown keys and values out of range."""
    unknown = [key for key in settings if key not in ServeConfig.__dataclass_fields__]
    if unknown:
        known = ", ".join(ServeConfig.__dataclass_fields__)
        raise ConfigError(f"serve.{unknown[0]}", settings[unknown[0]], f"the settings are {known}", "remove it")
    values: dict[str, Any] = {"model_name": Path(model).resolve().name, **settings}
    config = ServeConfig(**{**values, "engine": _engine_settings(values.get("engine", {}))})
    for name, least in AT_LEAST.items():
        value = getattr(config, name)
        if not isinstance(value, int) or value < least:
            raise ConfigError(f"serve.{name}", value, f"must be a whole number from {least} on", "choose another value")
    return config


def _engine_settings(values: dict[str, Any]) -> EngineConfig:
    unknown = [key for key in values if key not in EngineConfig.__dataclass_fields__]
    if unknown:
        known = ", ".join(EngineConfig.__dataclass_fields__)
        raise ConfigError(f"serve.engine.{unknown[0]}", values[unknown[0]], f"the settings are {known}", "remove it")
    return EngineConfig(**values)


def _add_routes(app: FastAPI, api: Api, card: ModelCard) -> None:
    @app.get("/health", responses=STOPPED)
    async def health() -> JSONResponse:
        healthy = api.runner.healthy
        return JSONResponse({"status": "ok" if healthy else "stopped"}, 200 if healthy else 503)

    @app.get("/ready", responses=STOPPED)
    async def ready() -> JSONResponse:
        accepts = api.runner.healthy and not api.draining
        return JSONResponse({"status": "ready" if accepts else "draining"}, 200 if accepts else 503)

    @app.get("/", response_class=FileResponse, responses=PAGE_ANSWER)
    async def page() -> HttpResponse:
        return FileResponse(PAGE, media_type="text/html", headers={"Content-Security-Policy": PAGE_POLICY})

    @app.get("/metrics", response_class=HttpResponse, responses=METRICS_ANSWER)
    async def metrics() -> HttpResponse:
        return HttpResponse(api.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [card.model_dump()]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> JSONResponse:
        api.check_model(name)
        return JSONResponse(card.model_dump())

    @app.post("/v1/completions", responses=GENERATED)
    async def completions(request: Request, body: CompletionRequest) -> HttpResponse:
        return await api.completions(request, body)

    @app.post("/v1/chat/completions", responses=GENERATED)
    async def chat_completions(request: Request, body: ChatRequest) -> HttpResponse:
        return await api.chat_completions(request, body)

    @app.post("/v1/embeddings", responses=BUSY)
    async def embeddings(request: Request, body: EmbeddingsRequest) -> HttpResponse:
        return await api.embeddings(request, body)


def _model_card(engine: Engine, config: ServeConfig) -> ModelCard:
    created = int((engine.folder / "config.json").stat().st_mtime)
    return ModelCard(id=config.model_name, created=created, max_model_len=engine.context)


class CountAnswers:
    """ASGI middleware that counts answers by endpoint and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Only paths that exist become labels: a client must not be able to create series.
                endpoint = scope["path"] if scope["path"] in ENDPOINTS else "other"
                self.metrics.answers.labels(endpoint, str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, counting)


ENDPOINTS = (
    "/",
    "/health",
    "/ready",
    "/metrics",
    "/v1/models",
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/embeddings",
)
