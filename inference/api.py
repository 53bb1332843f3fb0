"""Completions and chat completions: from a parsed request to the answer or the stream of events."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.responses import Response as HttpResponse

from conf.schema import ServeConfig
from inference.api_errors import ApiError, as_api_error, error_object
from inference.chat import ChatTemplate
from inference.engine import Step
from inference.metrics import Metrics
from inference.protocol import (
    ChatChoice,
    ChatMessage,
    ChatPiece,
    ChatRequest,
    CompletionChoice,
    CompletionRequest,
    GenerationRequest,
    Response,
    Usage,
)
from inference.runner import Job, Runner
from inference.streaming import DONE, EventStream, event, unless_disconnected

COMPLETION_TOKENS = 16  # the API's default for completions; a chat may go up to the server's bound
CLIENT_LEFT = 499  # never sent: nobody is there to read it


class Api:
    """The two generating endpoints over one runner."""

    def __init__(self, runner: Runner, chat: ChatTemplate, metrics: Metrics, settings: ServeConfig) -> None:
        self.runner, self.chat, self.metrics, self.settings = runner, chat, metrics, settings

    async def completions(self, request: Request, body: CompletionRequest) -> HttpResponse:
        """``POST /v1/completions``."""
        self._check(body)
        prompts = await asyncio.to_thread(self._encoded, body.prompt)
        answer = _Answer("cmpl", "text_completion", "text_completion", self.settings.model_name)
        return await self._answer(request, body, prompts, answer, COMPLETION_TOKENS, ())

    async def chat_completions(self, request: Request, body: ChatRequest) -> HttpResponse:
        """``POST /v1/chat/completions``."""
        self._check(body)
        messages = [message.model_dump() | {"content": _text(message.content)} for message in body.messages]
        prompt = await asyncio.to_thread(self._rendered, messages)
        answer = _Answer("chatcmpl", "chat.completion", "chat.completion.chunk", self.settings.model_name)
        return await self._answer(request, body, [prompt], answer, self.settings.max_tokens, self.chat.stops)

    def check_model(self, name: str | None) -> None:
        """Raises ApiError 404 for a model that is not served here; None is the served one."""
        if name is not None and name != self.settings.model_name:
            message = f"the model {name!r} is not served here; {self.settings.model_name!r} is"
            raise ApiError(404, message, "model", "model_not_found")

    def _check(self, body: GenerationRequest) -> None:
        self.check_model(body.model)
        body.refuse_unsupported()
        wanted, most = body.wanted_tokens, self.settings.max_tokens
        if wanted is not None and wanted > most:
            raise ApiError(400, f"max_tokens: {wanted} is more than this server allows ({most})", "max_tokens")

    def _encoded(self, prompt: str | list[str] | list[int] | list[list[int]]) -> list[list[int]]:
        """Token ids of every prompt; a flat list of ids is one prompt."""
        engine = self.runner.engine
        if isinstance(prompt, str):
            return [engine.encode(prompt)]
        if not prompt:
            raise ApiError(400, "prompt: must not be an empty list", "prompt")
        many = self.settings.max_concurrent + self.settings.max_queue
        if not isinstance(prompt[0], int) and len(prompt) > many:
            raise ApiError(400, f"prompt: {len(prompt)} prompts are more than this server queues ({many})", "prompt")
        if isinstance(prompt[0], int):
            return [[part for part in prompt if isinstance(part, int)]]
        return [engine.encode(part) if isinstance(part, str) else part for part in prompt if not isinstance(part, int)]

    def _rendered(self, messages: list[dict[str, Any]]) -> list[int]:
        text = self.chat.render(messages)
        engine = self.runner.engine
        return engine.encode_template(text) if self.chat.has_special_tokens else engine.encode(text)

    async def _answer(
        self,
        request: Request,
        body: GenerationRequest,
        prompts: list[list[int]],
        answer: "_Answer",
        default_tokens: int,
        stops: tuple[str, ...],
    ) -> HttpResponse:
        wanted = body.wanted_tokens or min(default_tokens, self.settings.max_tokens)
        job = self.runner.submit(prompts, body.sampling(wanted, stops))
        self.metrics.prompt_tokens.inc(sum(len(prompt) for prompt in prompts))

        def close(stayed: bool) -> None:
            job.cancel()
            if not stayed:
                self.metrics.cancelled.inc()

        if body.stream:
            return EventStream(self._events(job, answer, body.include_usage), close)
        stayed, texts = True, None
        try:
            work = _collect(self._steps(job), len(prompts))
            stayed, texts = await unless_disconnected(request.receive, work)
        except asyncio.CancelledError:
            stayed = False
            raise
        finally:
            close(stayed)
        return (
            HttpResponse(status_code=CLIENT_LEFT) if texts is None else JSONResponse(answer.whole(texts, _usage(job)))
        )

    async def _events(self, job: Job, answer: "_Answer", include_usage: bool) -> AsyncIterator[str]:
        """The server-sent events of a job; an error after the first one becomes the last event."""

        def text(content: dict[str, Any]) -> str:
            return event(content if include_usage else {k: v for k, v in content.items() if k != "usage"})

        try:
            for index in range(len(job.generations)):
                if (opening := answer.opening(index)) is not None:
                    yield text(opening)
            async for index, step in self._steps(job):
                if step.text or step.finish_reason:
                    yield text(answer.piece(index, step))
            if include_usage:
                yield text(answer.last(_usage(job)))
            yield DONE
        except Exception as error:
            found = as_api_error(error)
            yield event(error_object(found.status, found.message, found.param, found.code))

    async def _steps(self, job: Job) -> AsyncIterator[tuple[int, Step]]:
        """The job's steps, measured."""
        start = time.perf_counter()
        latest: dict[int, float] = {}
        async for index, step in job:
            now = time.perf_counter()
            histogram = self.metrics.between_tokens if index in latest else self.metrics.first_token
            histogram.observe(now - latest.get(index, start))
            latest[index] = now
            self.metrics.generation_tokens.inc()
            yield index, step
        self.metrics.whole_request.observe(time.perf_counter() - start)


class _Answer:
    """Builds the response objects of one request, which share an id and a time."""

    def __init__(self, prefix: str, whole: str, piece: str, model: str) -> None:
        self._id, self._created = f"{prefix}-{uuid.uuid4().hex}", int(time.time())
        self._whole, self._piece, self._model = whole, piece, model
        self._chat = whole != piece

    def opening(self, index: int) -> dict[str, Any] | None:
        """A chat stream begins with the role."""
        if not self._chat:
            return None
        return self._object(self._piece, [ChatPiece(index=index, delta={"role": "assistant", "content": ""})])

    def piece(self, index: int, step: Step) -> dict[str, Any]:
        """One event of a stream."""
        if not self._chat:
            choice = CompletionChoice(index=index, text=step.text, finish_reason=step.finish_reason)
            return self._object(self._piece, [choice])
        delta = {"content": step.text} if step.text else {}
        return self._object(self._piece, [ChatPiece(index=index, delta=delta, finish_reason=step.finish_reason)])

    def last(self, usage: Usage) -> dict[str, Any]:
        """The event that carries the usage and no choices."""
        return self._object(self._piece, [], usage)

    def whole(self, texts: list[tuple[str, str]], usage: Usage) -> dict[str, Any]:
        """The answer of a request that is not streamed, from (text, finish reason) of every prompt."""
        choices: list[Any] = []
        for index, (text, reason) in enumerate(texts):
            if self._chat:
                message = ChatMessage(role="assistant", content=text)
                choices.append(ChatChoice(index=index, message=message, finish_reason=reason))
            else:
                choices.append(CompletionChoice(index=index, text=text, finish_reason=reason))
        return self._object(self._whole, choices, usage)

    def _object(self, kind: Any, choices: list[Any], usage: Usage | None = None) -> dict[str, Any]:
        response = Response(
            id=self._id, object=kind, created=self._created, model=self._model, choices=choices, usage=usage
        )
        return response.model_dump()


async def _collect(steps: AsyncIterator[tuple[int, Step]], prompts: int) -> list[tuple[str, str]]:
    texts, reasons = [""] * prompts, [""] * prompts
    async for index, step in steps:
        texts[index] += step.text
        reasons[index] = step.finish_reason or ""
    return list(zip(texts, reasons, strict=True))


def _usage(job: Job) -> Usage:
    prompt = sum(generation.prompt_tokens for generation in job.generations)
    completion = sum(generation.completion_tokens for generation in job.generations)
    return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


def _text(content: str | list[dict[str, Any]] | None) -> str:
    """The text of a message. Raises ApiError 400 for parts that are not text."""
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ApiError(400, f"messages: a part of type {part.get('type')!r} is not supported", "messages")
    return "".join(part["text"] for part in content)
