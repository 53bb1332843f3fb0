"""What the HTTP path costs beside the engine in-process, and how the server behaves beyond its bounds.

    python -m benchmarks.serving [--quick] [--json FILE] [--model FOLDER]

The server runs in a process of its own. Rows: time to the first token over HTTP beside the engine alone; the largest
usual gap between tokens of a running stream while a long prompt is computed, beside the gap without it. Checks, each an
error where it fails: of many clients at once all are answered 200 or 429, and 429 names a time; thousands of malformed
requests are refused as such; streams whose clients leave free every page; SIGTERM ends the process with 0.
"""

import argparse
import asyncio
import itertools
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn

from benchmarks.table import Row, compare, report
from conf.serving import EngineConfig
from data.tokenize import train_tokenizer
from inference.engine import Engine
from inference.generation import Generation
from inference.params import SamplingParams
from inference.server import build_app
from models.decoder import Decoder, ModelSpec
from models.hf import save_hf

SMALL = ModelSpec(2048, 256, 8, 8, 4, 32, 704, context=8192, init_std=0.1)
TINY = ModelSpec(512, 64, 2, 4, 2, 16, 128, context=2048, init_std=0.2)
SETTINGS = {"model_name": "model", "max_concurrent": 8, "max_queue": 32, "max_tokens": 2048, "max_body_bytes": 200_000}
PROMPT = list(range(1, 65))
START_SEC, TIMEOUT_SEC = 120.0, 300.0


def request(prompt: list[int], tokens: int, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **more}


async def stream_times(client: httpx.AsyncClient, prompt: list[int], tokens: int) -> list[float]:
    """When the request was sent, and when each piece of text came."""
    times = [time.perf_counter()]
    async with client.stream(
        "POST", "/v1/completions", json=request(prompt, tokens, stream=True, logprobs=0)
    ) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                times.append(time.perf_counter())
    return times


async def first_token(client: httpx.AsyncClient, engine: Engine, clients: int, rounds: int) -> list[Row]:
    """Milliseconds to the first token of some clients at once, over HTTP and in this process, taking turns."""
    over_http: list[float] = []
    inside: list[float] = []
    params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    for index in range(rounds + 1):
        # Fresh text each time: a remembered prompt would hide its own cost.
        prompts = [[random.randrange(1, 400) for _ in PROMPT] for _ in range(clients)]
        found = await asyncio.gather(*(stream_times(client, prompt, 2) for prompt in prompts))
        start, texts = time.perf_counter(), [engine.start(prompt, params) for prompt in prompts]
        for text in texts:
            engine.submit(text)
        came: dict[Generation, float] = {}
        while engine.busy:
            for text in engine.step():
                if text.completion_tokens:
                    came.setdefault(text, 1000 * (time.perf_counter() - start))
        if index:
            over_http += [1000 * (times[1] - times[0]) for times in found]
            inside += came.values()
    rows = []
    for name, share in (("median", 0.5), ("p95", 0.95)):
        ours, alone = (sorted(times)[int(share * len(times))] for times in (over_http, inside))
        rows.append(compare(f"first token, {clients} clients", f"ms, {name}", ours, alone, "engine in-process"))
    return rows


async def beside_a_long_prompt(client: httpx.AsyncClient, long: int, tokens: int) -> list[Row]:
    """95th percentile of the gaps of four streams, without and with a long prompt that arrives meanwhile."""
    gaps: dict[bool, list[float]] = {}
    waits: dict[bool, float] = {}
    long_prompts = [[random.randrange(1, 400) for _ in range(long)] for _ in range(2)]
    waits[False] = await _first(client, long_prompts[0])
    for busy in (False, True):
        texts = [[random.randrange(1, 400) for _ in PROMPT] for _ in range(4)]
        streams = [asyncio.create_task(stream_times(client, text, tokens)) for text in texts]
        if busy:
            waits[True] = await _first(client, long_prompts[1])
        found = await asyncio.gather(*streams)
        gaps[busy] = sorted(1000 * (b - a) for times in found for a, b in itertools.pairwise(times[1:]))
    late = [gaps[busy][int(0.95 * len(gaps[busy]))] for busy in (True, False)]
    case = f"beside a {long}-token prompt"
    return [
        compare(case, "ms between tokens, p95", late[0], late[1], "without it"),
        compare(case, "its own first token, ms", 1000 * waits[True], 1000 * waits[False], "alone"),
    ]


async def _first(client: httpx.AsyncClient, prompt: list[int]) -> float:
    times = await stream_times(client, prompt, 1)
    return times[1] - times[0]


async def overload(client: httpx.AsyncClient, clients: int, probes: int) -> list[Row]:
    """All at once, and then one more every 20 ms, more than the model can do: 200 or 429, and refusals at once.

    The times to a refusal are those of the latter, since this process too takes its time to send ``clients`` requests.
    """

    async def ask() -> tuple[int, float]:
        start = time.perf_counter()
        answer = await client.post("/v1/completions", json=request(PROMPT, 16))
        assert answer.status_code in (200, 429), answer.text
        assert answer.status_code == 200 or int(answer.headers["retry-after"]) >= 1
        return answer.status_code, 1000 * (time.perf_counter() - start)

    await ask()
    memory = await resident(client)
    herd = [asyncio.create_task(ask()) for _ in range(clients)]
    while sum(task.done() for task in herd) < clients // 2:
        await asyncio.sleep(0.05)
    late = []
    for _ in range(probes):
        late.append(asyncio.create_task(ask()))
        await asyncio.sleep(0.02)
    found = await asyncio.gather(*herd, *late)
    memory = [memory, await resident(client)]
    accepted = [taken for status, taken in found if status == 200]
    refused = sorted(taken for status, taken in found[clients:] if status == 429)
    assert accepted, "everything was refused"
    assert refused, "nothing was refused: ask with more clients"
    case = f"{clients} clients at once and {probes} more, {len(accepted)} accepted"
    return [
        compare(case, "ms to 429, median", statistics.median(refused), max(accepted), "last answer"),
        compare(case, "ms to 429, p95", refused[int(0.95 * len(refused))], max(accepted), "last answer"),
        compare(case, "server's memory, MB", memory[1], memory[0], "before"),
    ]


async def resident(client: httpx.AsyncClient) -> float:
    """The server's resident memory in MB."""
    text = (await client.get("/metrics")).text
    line = next(line for line in text.splitlines() if line.startswith("process_resident_memory_bytes "))
    return float(line.split()[1]) / 1e6


async def abuse(client: httpx.AsyncClient, count: int) -> None:
    """Malformed requests are the client's fault, each of them."""
    generator = random.Random(0)
    values: list[Any] = [
        None,
        -1,
        10**30,
        1e308,
        "",
        "x" * 999,
        [],
        [[]],
        {},
        {"type": []},
        True,
        [None],
        [-1],
        "\ud800",
    ]
    fields = [
        "prompt",
        "max_tokens",
        "temperature",
        "top_p",
        "n",
        "stop",
        "logit_bias",
        "response_format",
        "seed",
        "logprobs",
    ]
    for _ in range(count):
        content = {generator.choice(fields): generator.choice(values) for _ in range(3)} | {"max_tokens": -1}
        body = (
            str(content)
            if generator.random() < 0.2
            else httpx.Request("POST", "http://x", json=_plain(content)).content
        )
        answer = await client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        assert 400 <= answer.status_code < 500, f"{content}: {answer.status_code} {answer.text}"


def _plain(content: dict[str, Any]) -> dict[str, Any]:
    return {name: "?" if value == "\ud800" else value for name, value in content.items()}


async def leave(client: httpx.AsyncClient, count: int) -> None:
    """Streams that are left after their first piece free every page."""

    async def one() -> None:
        async with client.stream("POST", "/v1/completions", json=request(PROMPT, 1000, stream=True)) as answer:
            async for _ in answer.aiter_lines():
                break

    for _ in range(count // 8):
        await asyncio.gather(*(one() for _ in range(8)))
    deadline = time.monotonic() + 60
    while "sundog_kv_pages_used 0.0" not in (page := (await client.get("/metrics")).text):
        assert time.monotonic() < deadline, "pages are in use though nobody waits: " + page
        await asyncio.sleep(0.1)


async def measure(url: str, engine: Engine, quick: bool) -> list[Row]:
    limits = httpx.Limits(max_connections=1000)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_SEC, limits=limits) as client:
        rows = [row for clients in (1, 8) for row in await first_token(client, engine, clients, 3 if quick else 30)]
        rows += await beside_a_long_prompt(client, 600 if quick else 6000, 60 if quick else 300)
        rows += await overload(client, 60, 20) if quick else await overload(client, 200, 500)
        await abuse(client, 100 if quick else 10_000)
        await leave(client, 16 if quick else 200)
        assert (await client.get("/health")).status_code == 200
    return rows


def serve(folder: str, descriptor: int) -> None:
    """The server's process, on a socket that it was given."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn drains on its own and then raises the signal once more
    listener = socket.socket(fileno=descriptor)
    uvicorn.Server(uvicorn.Config(build_app(folder, SETTINGS), log_level="error")).run(sockets=[listener])


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """A server of a model in a process of its own; gives its address, and ends it as an operator would."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    command = [sys.executable, "-m", "benchmarks.serving", "--serve", str(folder), str(listener.fileno())]
    process = subprocess.Popen(command, pass_fds=[listener.fileno()])
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        start = time.monotonic()
        httpx.get(f"{url}/ready", timeout=START_SEC).raise_for_status()  # waits in the backlog until it listens
        print(f"ready after {time.monotonic() - start:.1f} s")
        yield url
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, f"SIGTERM ended it with {process.returncode}"
    finally:
        process.kill()
        process.wait()
        listener.close()


def run(folder: Path, quick: bool) -> list[Row]:
    with serving(folder) as url:
        engine = Engine(folder, EngineConfig(prefix_cache=False))
        return asyncio.run(measure(url, engine, quick))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model and few requests")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    parser.add_argument("--model", type=Path, help="a model folder with a tokenizer")
    parser.add_argument("--serve", nargs=2, metavar=("FOLDER", "DESCRIPTOR"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve[0], int(options.serve[1]))
        return
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model or Path(scratch) / "model"
        if options.model is None:
            train_tokenizer(["the cat sat on the mat and went home. " * 50], 290, Path(scratch) / "tokenizer")
            save_hf(Decoder(TINY if options.quick else SMALL).initialise(0), folder, Path(scratch) / "tokenizer")
        rows = run(folder, options.quick)
    notes = ["all answers 200 or 429; malformed requests 4xx; no page left in use; SIGTERM ended it with 0"]
    report(rows, options.json, "Server", [*notes, f"load average {load:.1f} before and {os.getloadavg()[0]:.1f} after"])


if __name__ == "__main__":
    main()
