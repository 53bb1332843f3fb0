"""A server that speaks the chat completions protocol and misbehaves as asked: for tests and benchmarks of clients."""

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

# (number of the attempt for this request, from 1; the body) -> what to do: "answer", a status, or a name below
Behave = Callable[[int, dict[str, Any]], "str | int"]


@dataclass
class Served:
    """What a server saw: attempts and complete answers by request, most requests at once."""

    url: str = ""
    attempts: Counter[str] = field(default_factory=Counter)
    answered: Counter[str] = field(default_factory=Counter)
    tokens: set[str] = field(default_factory=set)  # bearer tokens
    bodies: list[dict[str, Any]] = field(default_factory=list)
    now: int = 0
    most: int = 0


def rephrase_of(body: dict[str, Any]) -> str:
    """A harmless answer: the last words of the prompt in reverse order, inside sentinels."""
    words = body["messages"][-1]["content"].split()
    return "<rewrite>\n" + " ".join(reversed(words[-40:])) + ".\n</rewrite>"


def completion(text: str, body: dict[str, Any]) -> dict[str, Any]:
    """The body of an answer."""
    usage = {"prompt_tokens": 10, "completion_tokens": len(text.split())}
    message = {"role": "assistant", "content": text}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    return {"object": "chat.completion", "model": body["model"], "choices": choices, "usage": usage}


def make_app(served: Served, behave: Behave, answer: Callable[[dict[str, Any]], str], meet: int) -> web.Application:
    """The application; ``served`` is filled as requests come. The first waits for ``meet`` to be there at once."""
    met = asyncio.Event()

    async def complete(request: web.Request) -> web.StreamResponse:
        body, name = await request.json(), request.headers.get("Idempotency-Key", "")
        served.attempts[name] += 1
        served.tokens.add(request.headers.get("Authorization", ""))
        served.bodies.append(body)
        served.now += 1
        served.most = max(served.most, served.now)
        if served.now >= meet:
            met.set()
        try:
            await met.wait()
            return await _act(request, behave(served.attempts[name], body), body, name)
        finally:
            served.now -= 1

    async def _act(request: web.Request, act: str | int, body: dict[str, Any], name: str) -> web.StreamResponse:
        whole = json.dumps(completion(answer(body), body)).encode()
        if isinstance(act, int):
            wait = {"Retry-After": "0"} if act == 429 else {}
            said = "this model's maximum context length is 8" if act == 400 else "no"
            return web.Response(status=act, text=said, headers=wait)
        if act == "slow":
            await asyncio.sleep(30)
        if act == "later":
            await asyncio.sleep(0.2)
        if act == "drop":
            assert request.transport is not None
            request.transport.close()
        if act == "nonsense":
            return web.Response(text="<html>busy</html>")
        if act == "no_choices":
            return web.json_response({"choices": []})
        if act == "null_text":
            return web.json_response({"choices": [{"message": {"content": None}}]})
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        await response.write(whole[: len(whole) // 2])
        if act == "cut":
            assert request.transport is not None
            request.transport.close()
            return response
        await response.write(whole[len(whole) // 2 :])
        await response.write_eof()
        served.answered[name] += 1
        return response

    app = web.Application()
    app.router.add_post("/v1/chat/completions", complete)
    return app


@contextmanager
def chat_server(
    behave: Behave = lambda attempt, body: "answer",
    answer: Callable[[dict[str, Any]], str] = rephrase_of,
    meet: int = 1,
) -> Iterator[Served]:
    """A server on loopback in a thread of its own."""
    served, loop, ready = Served(), asyncio.new_event_loop(), threading.Event()
    runner = web.AppRunner(make_app(served, behave, answer, meet), shutdown_timeout=0.1)

    async def start() -> None:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        served.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        ready.set()

    thread = threading.Thread(target=lambda: (loop.run_until_complete(start()), loop.run_forever()), daemon=True)
    thread.start()
    assert ready.wait(30), "the server did not start"
    try:
        yield served
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
