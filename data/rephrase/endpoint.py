"""An OpenAI-compatible server as a generator: many requests in flight, each retried within bounds, none twice.

``slots`` tasks take requests from one queue, so that a slot is busy again as soon as its answer is there and no slow
request holds others up; reading requests and keeping answers have threads of their own, because a disk that is waited
for would hold up all slots. What may pass (no connection, a cut answer, 408, 409, 425, 429, 5xx, an answer that is no
JSON or lacks its fields, no answer in time) is tried again after a wait that doubles, or as long as the server says;
what will not (400, 413, 422: the request itself) is an answer of its own kind; what concerns all requests (401, 403,
404, a server that answers nothing any more) ends the run.
"""

import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from conf.errors import ConfigError, ResourceError
from data.rephrase.beside import Ahead, Keeper, prompt_loop
from data.rephrase.store import Answer

PASSING = {408, 409, 425, 429}  # and all from 500 on
FATAL = {401: "the server wants a token", 403: "the token may not do this", 404: "no such address or model"}
CONTEXT_WORDS = ("context", "too long", "maximum length", "max_model_len")
TOO_LONG = "prompt_too_long"
LONGEST_WAIT_SEC = 60.0
MAX_ANSWER_BYTES = 16 << 20
AnswerKeeper = Keeper[tuple[str, Answer]]


@dataclass(frozen=True)
class Request:
    """One request: its id, and the body that is posted."""

    id: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Post:
    """A request whose body is written out."""

    id: str
    content: bytes


@dataclass(frozen=True)
class Limits:
    """How a server is used; ``token`` is its bearer token, if any."""

    url: str
    slots: int
    retries: int
    retry_sec: float
    timeout_sec: float
    token: str = ""


@dataclass
class Tally:
    """What happened: answers, refusals, requests given up (by their last failure), attempts repeated by reason."""

    answered: int = 0
    refused: int = 0
    sent: int = 0
    given_up: Counter[str] = field(default_factory=Counter)
    retried: Counter[str] = field(default_factory=Counter)
    earlier: int = 0  # answers of earlier runs
    lost_in_a_row: int = 0
    seconds: float = 0.0

    @property
    def works(self) -> bool:
        """Whether the server has ever answered."""
        return self.answered + self.earlier > 0


class Passing(Exception):
    """A failure that may pass: its name, and how long the server asks to wait."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.wait = reason, wait


def token_of(variable: str) -> str:
    """The bearer token in an environment variable; empty where there is none."""
    return os.environ.get(variable, "") if variable else ""


def answer_all(
    requests: Iterator[Request], limits: Limits, put: Callable[[dict[str, Answer]], None], tally: Tally | None = None
) -> Tally:
    """Sends every request and hands the answers to ``put`` as they come; returns the tally, which ``put`` may look at.

    ``requests`` and ``put`` are called in threads, each in one at a time. A slot sends its next request when ``put``
    has returned, so at most ``slots`` requests are sent but not handed on at any moment, and a process that is killed
    asks no more than those again. All answers that came have been handed on at the end, also where it is an error.
    Requests that were given up are in no answer: the caller may try them again. Raises ConfigError for what will fail
    for every request, ResourceError for a server that answers none of many in a row, and what ``requests`` and ``put``
    raise.
    """
    tally = Tally() if tally is None else tally
    with prompt_loop(), AnswerKeeper(lambda found: put(dict(found))) as keeper:
        asyncio.run(_answer_all(requests, limits, keeper, tally))
    return tally


async def _answer_all(requests: Iterator[Request], limits: Limits, keeper: AnswerKeeper, tally: Tally) -> None:
    start, ahead = time.monotonic(), Ahead(_posts(requests), limits.slots)
    connector = aiohttp.TCPConnector(limit=limits.slots, ttl_dns_cache=300)
    headers = {"Authorization": f"Bearer {limits.token}"} if limits.token else {}
    session = aiohttp.ClientSession(
        connector=connector,
        headers=headers,
        timeout=aiohttp.ClientTimeout(total=limits.timeout_sec),
        cookie_jar=aiohttp.DummyCookieJar(),
    )
    async with session:

        async def work() -> None:
            while (post := await ahead.take()) is not None:
                answer = await _answer(session, post, limits, tally)
                tally.lost_in_a_row = tally.lost_in_a_row + 1 if answer is None else 0
                if answer is None:
                    _stop_if_dead(tally, limits)
                else:
                    await keep(post.id, answer)

        async def keep(request: str, answer: Answer) -> None:
            """Keeps an answer; refusals once the server has shown that it answers some request."""
            refused = "error" in answer
            tally.answered += not refused
            tally.refused += refused
            if refused and answer["error"] != TOO_LONG:
                unsure.append((request, answer))
            else:
                await keeper.put((request, answer))
            if tally.works or len(unsure) >= max(8, limits.slots):
                await settle()

        async def settle() -> None:
            """Keeps the refusals that came so far, or raises that there is nothing else."""
            if unsure and not tally.works:
                raise _refuses_all(limits, unsure)
            while unsure:
                await keeper.put(unsure.pop())

        unsure: list[tuple[str, Answer]] = []
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(limits.slots):
                    group.create_task(work())
        except BaseExceptionGroup as found:  # a signal's too, where the command itself asks
            raise found.exceptions[0] from None
        await settle()
    tally.seconds = time.monotonic() - start


def _posts(requests: Iterator[Request]) -> Iterator[Post]:
    """The requests as they are posted."""
    for request in requests:
        yield Post(request.id, json.dumps(request.body).encode())


async def _answer(session: aiohttp.ClientSession, post: Post, limits: Limits, tally: Tally) -> Answer | None:
    """The answer to one request after as many attempts as it takes; None where it was given up."""
    for attempt in range(limits.retries + 1):
        tally.sent += 1
        try:
            return await _attempt(session, post, limits)
        except Passing as failure:
            if attempt == limits.retries:
                tally.given_up[failure.reason] += 1
                return None
            tally.retried[failure.reason] += 1
            wait = limits.retry_sec * 2**attempt * (0.5 + random.random())  # spread: not all slots come back at once
            await asyncio.sleep(min(LONGEST_WAIT_SEC, wait if failure.wait is None else failure.wait))
    raise AssertionError("the last attempt returns")


async def _attempt(session: aiohttp.ClientSession, post: Post, limits: Limits) -> Answer:
    url, start = limits.url.rstrip("/") + "/chat/completions", time.monotonic()
    headers = {"Idempotency-Key": post.id, "Content-Type": "application/json"}
    try:
        async with session.post(url, data=post.content, headers=headers) as response:
            status, wait = response.status, _retry_after(response)
            content = await response.content.read(MAX_ANSWER_BYTES) if status != 200 else await response.read()
    except TimeoutError:
        raise Passing("timeout") from None
    except aiohttp.ClientPayloadError:
        raise Passing("cut_answer") from None
    except (aiohttp.ClientError, OSError):
        raise Passing("no_connection") from None
    if status == 200:
        return _parse(content, time.monotonic() - start)
    said = content[:300].decode("utf-8", "replace").strip()
    if status in PASSING or status >= 500:
        raise Passing(f"status_{status}", wait)
    if status in FATAL:
        fix = "check rephrase.endpoint, rephrase.model and rephrase.api_key_env"
        raise ConfigError("rephrase.endpoint", f"{url} answered {status}: {said}", FATAL[status], fix)
    return {"error": refusal(status, said), "said": said}


def refusal(status: int, said: str) -> str:
    """What a server's refusal of one request is called."""
    too_long = status in (400, 413, 422) and any(word in said.lower() for word in CONTEXT_WORDS)
    return TOO_LONG if too_long else f"refused_{status}"


def _retry_after(response: aiohttp.ClientResponse) -> float | None:
    """Seconds that the server asks to wait; a date or nonsense counts as nothing."""
    try:
        return max(0.0, float(response.headers["Retry-After"]))
    except (KeyError, ValueError):
        return None


def _parse(content: bytes, seconds: float) -> Answer:
    """The answer in the body of a chat completion; anything else may pass."""
    try:
        found = json.loads(content)
        choice = found["choices"][0]
        text, finish = choice["message"]["content"], choice.get("finish_reason") or "stop"
        usage = found.get("usage") or {}
        counts = {
            "prompt_tokens": int(usage.get("prompt_tokens") or 0),
            "tokens": int(usage.get("completion_tokens") or 0),
        }
    except (ValueError, LookupError, TypeError, AttributeError):
        raise Passing("nonsense") from None
    if not isinstance(text, str) or not isinstance(finish, str):
        raise Passing("nonsense")
    return {"text": text, "finish": finish, **counts, "seconds": round(seconds, 4)}


def _refuses_all(limits: Limits, refused: list[tuple[str, Answer]]) -> ConfigError:
    """What is wrong where all requests so far were refused, and none for its length: the settings, not the texts."""
    value = f"{limits.url} refused all of {len(refused)} requests ({refused[0][1]['error']}): {refused[0][1]['said']}"
    fix = "change what it objects to: rephrase.model, top_p or temperature, max_tokens of the styles, or the server"
    return ConfigError("rephrase.endpoint", value, "some request is answered", fix)


def _stop_if_dead(tally: Tally, limits: Limits) -> None:
    """Ends the run when as many requests in a row as there are slots (8 at least) were given up."""
    if tally.lost_in_a_row >= max(8, limits.slots):
        reasons = ", ".join(f"{reason} {count}" for reason, count in tally.given_up.items())
        rule = f"of {tally.lost_in_a_row} requests in a row one is answered within {limits.retries + 1} attempts"
        fix = "when the server works again, run the same command: what was answered is kept"
        raise ResourceError("rephrase.endpoint", f"{limits.url}: {reasons}", rule, fix)
