"""Completions, chat completions and embeddings: from a parsed request to the answer or the stream of events."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.responses import Response as HttpResponse

from conf.serving import ServeConfig
from inference.answers import Answer, embeddings, usage_of
from inference.api_errors import ApiError, as_api_error, error_object
from inference.chat import ChatTemplate
from inference.generation import Step
from inference.metrics import Metrics
from inference.params import SamplingParams
from inference.protocol import ChatRequest, CompletionRequest, EmbeddingsRequest, GenerationRequest, Usage
from inference.runner import CLOSED_RETRY_SEC, Closed, Job, Runner
from inference.streaming import DONE, EventStream, event, unless_disconnected

COMPLETION_TOKENS = 16  # the API's default for completions; a chat may go up to the server's bound
CLIENT_LEFT = 499  # never sent: nobody is there to read it

Prompts = str | list[str] | list[int] | list[list[int]]


@dataclass
class _Asked:
    """One request on its way: its job, its answer and what is repeated before each text."""

    job: Job
    answer: Answer
    prompts: int
    echoes: list[str]

    @property
    def usage(self) -> Usage:
        return usage_of(self.job.generations, self.prompts)


class Api:
    """The three working endpoints over one runner."""

    def __init__(self, runner: Runner, chat: ChatTemplate, metrics: Metrics, settings: ServeConfig) -> None:
        self.runner, self.chat, self.metrics, self.settings = runner, chat, metrics, settings
        self.draining = False

    async def completions(self, request: Request, body: CompletionRequest) -> HttpResponse:
        """``POST /v1/completions``."""
        self._check(body)
        prompts = await asyncio.to_thread(self._encoded, body.prompt, "prompt")
        most = COMPLETION_TOKENS if body.wanted_tokens is None else body.wanted_tokens
        params = body.sampling(min(most, self.settings.max_tokens))
        decode = self.runner.engine.tokenizer.decode
        echoes = [decode(prompt) if body.echo else "" for prompt in prompts for _ in range(body.n or 1)]
        return await self._answer(request, body, prompts, params, echoes)

    async def chat_completions(self, request: Request, body: ChatRequest) -> HttpResponse:
        """``POST /v1/chat/completions``."""
        self._check(body)
        messages = [message.model_dump() | {"content": _text(message.content)} for message in body.messages]
        prompt = await asyncio.to_thread(self._rendered, messages)
        most = self.settings.max_tokens if body.wanted_tokens is None else body.wanted_tokens
        params = body.sampling(most, self.chat.stops)
        return await self._answer(request, body, [prompt], params, [""] * (body.n or 1))

    async def embeddings(self, request: Request, body: EmbeddingsRequest) -> HttpResponse:
        """``POST /v1/embeddings``."""
        self.check_model(body.model)
        width = self.runner.engine.spec.dim
        if body.dimensions not in (None, width):
            raise ApiError(400, f"dimensions: this model's embeddings have {width}", "dimensions")
        self.admit()  # what came meanwhile may have filled it
        prompts = await asyncio.to_thread(self._encoded, body.input, "input")
        job = self.runner.submit(self.runner.prepare(prompts, SamplingParams(max_tokens=1), task="embed"))
        stayed, _ = await self._whole(request, job)
        if not stayed:
            return HttpResponse(status_code=CLIENT_LEFT)
        vectors = [g.embedding.tolist() for g in job.generations if g.embedding is not None]
        tokens = sum(len(prompt) for prompt in prompts)
        return JSONResponse(embeddings(self.settings.model_name, vectors, body.encoding_format or "float", tokens))

    def admit(self) -> None:
        """Raises QueueFull where no new work is taken on; for every request, before it is read."""
        if self.draining:
            raise Closed("the server is shutting down", CLOSED_RETRY_SEC)
        self.runner.refuse_if_full()

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
        self.admit()  # what came meanwhile may have filled it

    def _encoded(self, prompt: Prompts, field: str) -> list[list[int]]:
        """Token ids of every prompt; a flat list of ids is one prompt."""
        engine = self.runner.engine
        if isinstance(prompt, str):
            return [engine.encode(prompt)]
        if not prompt:
            raise ApiError(400, f"{field}: must not be an empty list", field)
        many = self.settings.max_concurrent + self.settings.max_queue
        if not isinstance(prompt[0], int) and len(prompt) > many:
            raise ApiError(400, f"{field}: {len(prompt)} texts are more than this server queues ({many})", field)
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
        params: SamplingParams,
        echoes: list[str],
    ) -> HttpResponse:
        salt = (body.cache_salt or "").encode()
        # A grammar's table of tokens may take a moment to build: not in the event loop.
        texts = await asyncio.to_thread(self.runner.prepare, prompts, params, body.n or 1, salt)
        job = self.runner.submit(texts)
        self.metrics.prompt_tokens.inc(sum(len(prompt) for prompt in prompts))
        chat = isinstance(body, ChatRequest)
        answer = Answer(chat, self.settings.model_name, self.runner.engine.tokenizer.decode, texts[0].lossy)
        asked = _Asked(job, answer, len(prompts), echoes)
        if body.stream:
            return EventStream(self._events(asked, body.include_usage), lambda stayed: self._close(job, stayed))
        stayed, steps = await self._whole(request, job)
        if steps is None or not stayed:
            return HttpResponse(status_code=CLIENT_LEFT)
        return JSONResponse(answer.whole(echoes, steps, job.generations, asked.usage))

    async def _whole(self, request: Request, job: Job) -> tuple[bool, list[list[Step]] | None]:
        """Every text's steps, unless the client leaves first."""
        stayed, steps = True, None
        try:
            work = _collect(self._steps(job), len(job.generations))
            stayed, steps = await unless_disconnected(request.receive, work)
        except asyncio.CancelledError:
            stayed = False
            raise
        finally:
            self._close(job, stayed)
        return stayed, steps

    def _close(self, job: Job, stayed: bool) -> None:
        job.cancel()
        if not stayed:
            self.metrics.cancelled.inc()

    async def _events(self, asked: _Asked, include_usage: bool) -> AsyncIterator[str]:
        """The server-sent events of a job; an error after the first one becomes the last event."""

        def text(content: dict[str, Any]) -> str:
            return event(content if include_usage else {k: v for k, v in content.items() if k != "usage"})

        job, answer = asked.job, asked.answer
        unsaid = {index for index, echo in enumerate(asked.echoes) if echo}
        try:
            for index in range(len(job.generations)):
                if (opening := answer.opening(index)) is not None:
                    yield text(opening)
            async for index, step in self._steps(job):
                if index in unsaid:  # with the first token, since the prompt's own log-probabilities are there by then
                    unsaid.remove(index)
                    yield text(answer.echo(index, asked.echoes[index], job.generations[index]))
                if step.text or step.finish_reason or step.logprob is not None:
                    yield text(answer.piece(index, step))
            if include_usage:
                yield text(answer.last(asked.usage))
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
            self.metrics.generation_tokens.inc(step.token >= 0)
            yield index, step
        self.metrics.whole_request.observe(time.perf_counter() - start)


async def _collect(steps: AsyncIterator[tuple[int, Step]], texts: int) -> list[list[Step]]:
    found: list[list[Step]] = [[] for _ in range(texts)]
    async for index, step in steps:
        found[index].append(step)
    return found


def _text(content: str | list[dict[str, Any]] | None) -> str:
    """The text of a message. Raises ApiError 400 for parts that are not text."""
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ApiError(400, f"messages: a part of type {part.get('type')!r} is not supported", "messages")
    return "".join(part["text"] for part in content)
