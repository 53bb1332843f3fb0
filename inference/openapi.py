"""The schema that ``/openapi.json`` publishes: what the endpoints take, and every status that they answer with."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from inference.protocol import Response


class ErrorDetail(BaseModel):
    """What went wrong, in OpenAI's form."""

    message: str
    type: str
    param: str | None  # the field of the request
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is not 200."""

    error: ErrorDetail


def _errors(**meanings: str) -> dict[int | str, dict[str, Any]]:
    return {int(name[1:]): {"model": ErrorBody, "description": text} for name, text in meanings.items()}


ERRORS = _errors(
    _400="the request is not one, or asks for what this server does not do",
    _401="the bearer token is missing or wrong",
    _404="no such model",
    _413="the body is too large",
    _500="a failure of the server",
)
BUSY = _errors(
    _429="the queue is full; Retry-After says for how long", _503="it shuts down, or the model took too long"
)
EVENT = {  # before OpenAPI 3.2 the schema of a stream is that of each event
    "type": "object",
    "properties": {"data": {"type": "string", "description": "a chunk as JSON; [DONE] at the end"}},
    "required": ["data"],
}
GENERATED: dict[int | str, dict[str, Any]] = {
    **BUSY,
    200: {
        "model": Response,
        "description": "the whole answer, or with stream=true server-sent events",
        "content": {"text/event-stream": {"schema": EVENT}},
    },
}
STOPPED: dict[int | str, dict[str, Any]] = {503: {"description": "no"}}
PAGE_ANSWER: dict[int | str, dict[str, Any]] = {200: {"content": {"text/html": {}}, "description": "a page to try it"}}
METRICS_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {}}, "description": "in the text format of Prometheus"}
}


def publish(app: FastAPI) -> None:
    """Let the application describe itself without the statuses that it never answers with."""

    def schema() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = get_openapi(title=app.title, version=app.version, routes=app.routes)
            for path in found["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)  # what does not validate is answered 400
            for unused in ("HTTPValidationError", "ValidationError"):
                found["components"]["schemas"].pop(unused, None)
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = schema
