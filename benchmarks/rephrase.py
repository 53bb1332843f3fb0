"""Rephrasing: slots kept busy at a server that takes 200 ms, beside Ray Data's HTTP stage; recall of the filters.

    python -m benchmarks.rephrase [--requests 51200] [--slots 256] [--peer-requests 16] [--fit]

The server runs in a process of its own and integrates over time how many requests it holds; the busy share is that,
from the first request to the last answer, over the slots. The peer is Ray's own stage class, called without a cluster.
"""

import argparse
import asyncio
import json
import multiprocessing
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from tempfile import TemporaryDirectory

from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from benchmarks.rephrase_labels import CLEAN, OWN, labelled
from conf.rephrase import OutputFilterConfig
from data.rephrase.endpoint import Limits, Request, answer_all
from data.rephrase.filters import judge
from data.rephrase.filters.support import WEIGHTS, signs
from data.rephrase.store import SHARDS, Store

LATENCY_SEC = 0.2
LENGTH = re.compile(rb"(?i)content-length: *(\d+)")


class Held:
    """Requests in flight: their integral over time, most at once, first arrival and last answer."""

    def __init__(self) -> None:
        self.now = self.most = self.done = 0
        self.seconds = self.first = self.last = 0.0

    def change(self, by: int) -> None:
        at = time.monotonic()
        self.first = self.first or at
        self.seconds += self.now * (at - (self.last or at))
        self.now, self.last = self.now + by, at
        self.most, self.done = max(self.most, self.now), self.done + (by < 0)


class DummyServer(asyncio.Protocol):
    """HTTP/1.1 with kept connections and nothing else: the server must not be what limits the client."""

    ANSWER = json.dumps({"choices": [{"message": {"content": "an answer"}, "finish_reason": "stop"}], "usage": {}})
    RESPONSE = (
        f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(ANSWER)}\r\n\r\n{ANSWER}"
    ).encode()

    def __init__(self, held: list[Held]) -> None:
        self.held, self.read = held, b""
        self.transport: asyncio.WriteTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.read += data
        head, found, body = self.read.partition(b"\r\n\r\n")
        length = LENGTH.search(head)
        if not found or (length and len(body) < int(length[1])):
            return
        self.read = b""
        self.held[0].change(1)
        asyncio.get_running_loop().call_later(LATENCY_SEC, self.respond)

    def respond(self) -> None:
        self.held[0].change(-1)
        self.transport.write(self.RESPONSE)


def serve(pipe: Connection) -> None:
    """A server that answers after LATENCY_SEC; each message on the pipe is answered with what it held since then."""

    async def run() -> None:
        held = [Held()]
        server = await asyncio.get_running_loop().create_server(lambda: DummyServer(held), "127.0.0.1", 0, backlog=1024)
        pipe.send((server.sockets[0].getsockname()[1], time.process_time()))
        while await asyncio.to_thread(pipe.recv):
            found, held[0] = held[0], Held()
            pipe.send({**vars(found), "cpu": time.process_time()})

    asyncio.run(run())


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows as Markdown."""
    for row in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(row)} |")


def requests(count: int) -> Iterator[Request]:
    for index in range(count):
        yield Request(
            f"{index % SHARDS:x}{index:07x}", {"model": "m", "messages": [{"role": "user", "content": "text " * 200}]}
        )


def ours(url: str, count: int, slots: int) -> str:
    """The client with its store of answers; nothing is lost or sent twice, or the error says so."""
    with TemporaryDirectory() as folder, Store(folder, range(SHARDS)) as store:
        tally = answer_all(requests(count), Limits(url, slots, 0, 0.0, 60.0), store.put)
        kept = len(store.get(request.id for request in requests(count)))
    return "" if (kept, tally.sent) == (count, count) else f"{kept} answers, {tally.sent} sent, of {count}"


def peer(url: str, count: int) -> str:
    """Ray Data's HTTP stage on the same requests; an error text where this Ray has no such stage."""
    try:
        from ray.llm._internal.batch.stages.http_request_stage import HttpRequestUDF
    except ImportError as error:
        return f"not importable here: {error}"
    stage = HttpRequestUDF(data_column="data", expected_input_keys=["payload"], url=f"{url}/chat/completions", qps=1000)
    rows = [
        {"payload": request.body, stage.IDX_IN_BATCH_COLUMN: index} for index, request in enumerate(requests(count))
    ]

    async def run() -> int:
        return len([row async for row in stage.udf(rows)])

    done = asyncio.run(run())
    return "" if done == count else f"{done} of {count} answers"


def measure_slots(count: int, slots: int, peer_count: int) -> None:
    near, far = multiprocessing.get_context("spawn").Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(far,), daemon=True)
    server.start()
    port, server_cpu = near.recv()
    url, rows = f"http://127.0.0.1:{port}/v1", []
    runs: dict[str, Callable[[], str]] = {
        "this client": lambda: ours(url, count, slots),
        "Ray Data's HTTP stage": lambda: peer(url, peer_count),
    }
    for name, run in runs.items():
        start, cpu = time.monotonic(), time.process_time()
        problem = run()
        seconds, cpu = time.monotonic() - start, time.process_time() - cpu
        near.send(True)
        held = near.recv()
        span = held["last"] - held["first"]
        if problem:
            rows.append((name, problem, "", "", "", "", ""))
            continue
        busy = held["seconds"] / (span * slots)
        costs = (f"{1000 * spent / held['done']:.2f}" for spent in (cpu, held["cpu"] - server_cpu))
        server_cpu = held["cpu"]
        rate = f"{held['done'] / seconds:,.0f}"
        rows.append((name, f"{held['done']:,}", f"{busy:.1%}", f"{held['most']}", rate, *costs))
    near.send(False)
    server.join(10)
    head = ("", "requests", f"busy share of {slots}", "most at once", "requests/s", "CPU ms/request", "of the server")
    print_table(head, rows)


def measure_filters(seed: int) -> None:
    start, limits = time.process_time(), OutputFilterConfig()
    found: dict[tuple[bool, str, str], list[str]] = defaultdict(list)
    rows = labelled(seed)
    for row in rows:
        found[row.origin == "model", row.label, "b" if row.held_out else "a"].append(judge(row.output, limits))
    shown = []
    ordered = sorted(found.items(), key=lambda item: (item[0][0], item[0][1] != CLEAN, item[0]))
    for (model, label, half), reasons in ordered:
        rejected, own = (sum(map(bool, reasons)), sum(reason in OWN.get(label, ()) for reason in reasons))
        most = ", ".join(f"{name} {n}" for name, n in Counter(filter(None, reasons)).most_common(3))
        kind = "small model" if model else "hand" if label == CLEAN else "planted"
        share = f"{rejected / len(reasons):.3f}"
        shown.append((label, kind, half, str(len(reasons)), share, f"{own / len(reasons):.3f}" if own else "", most))
    print(f"\n{len(rows):,} labelled outputs, {time.process_time() - start:.1f} CPU s")
    print_table(("class", "origin", "half", "outputs", "rejected", "by own filter", "reasons"), shown)


def fit_support(seed: int) -> None:
    """Prints weights for data/rephrase/filters/support.py, by the good and the invented prose of half a."""
    used = [
        row
        for row in labelled(seed)
        if not row.held_out and row.output.style.form == "prose" and row.origin in ("hand", "model")
        if row.label in (CLEAN, "invented")
    ]
    values = [list(signs(row.output).values()) for row in used]
    invented = [row.label == "invented" for row in used]
    scale = StandardScaler().fit(values)
    model = LogisticRegression(C=0.3, class_weight="balanced").fit(scale.transform(values), invented)
    weights = model.coef_[0] / scale.scale_
    print(f"{sum(invented)} invented, {len(used) - sum(invented)} good ones")
    for name, weight in zip(WEIGHTS, weights, strict=True):
        print(f'    "{name}": {weight:.2f},')
    print(f"BIAS = {model.intercept_[0] - weights @ scale.mean_:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=51_200)
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--peer-requests", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fit", action="store_true", help="print weights for the filter support, and end")
    options = parser.parse_args(sys.argv[1:])
    if options.fit:
        fit_support(options.seed)
        return
    measure_slots(options.requests, options.slots, options.peer_requests)
    measure_filters(options.seed)


if __name__ == "__main__":
    main()
