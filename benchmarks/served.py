"""The server as users start it, ``sundog serve`` on Ray Serve: its start, its memory, and what its path costs.

    python -m benchmarks.served [--quick] [--json FILE] [--model FOLDER]

Rows: seconds from the command, without a running cluster, to the first answer of ``/v1/chat/completions``; memory of
the replica, and of all processes that the command started; time to the first token through Serve's
proxy and the replica's actor beside the engine in this process, at 1 and 8 clients. The last are measured with the
server's own threads; the first run after an installation also compiles, which is not what is asked.
"""

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import torch

from benchmarks.inference import measured_model
from benchmarks.serving import TIMEOUT_SEC, first_token
from benchmarks.submitted import ROOT
from benchmarks.table import Row, compare, report
from cluster.local_head import free_port
from conf.serving import EngineConfig
from inference.engine import Engine

START_SEC, MEMORY_MB = 30.0, 1500.0  # that are asked for
WAIT_SEC = 180.0
QUESTION = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "temperature": 0}


@contextmanager
def command(folder: Path, log: Path) -> Iterator[tuple[str, float]]:
    """``sundog serve`` in a session of its own: (address, seconds to the first answer); ended by SIGTERM, with 0."""
    port = free_port()
    words = [sys.executable, "-m", "launch", "serve", f"serve.model={folder}", f"serve.port={port}", "name=model"]
    start = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(words, cwd=ROOT, stdout=out, stderr=out, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        while True:
            assert process.poll() is None, f"it ended with {process.returncode}: {log.read_text()[-2000:]}"
            assert time.monotonic() - start < WAIT_SEC, f"no answer: {log.read_text()[-2000:]}"
            with suppress(httpx.HTTPError):
                if httpx.post(f"{url}/v1/chat/completions", json=QUESTION, timeout=WAIT_SEC).status_code == 200:
                    break
            time.sleep(0.1)
        yield url, time.monotonic() - start
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0, f"SIGTERM ended it with {process.returncode}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def memory() -> dict[str, float]:
    """MB of the replica (resident) and of all processes below this one (proportional: shared pages count once)."""
    found = {"replica": 0.0, "all": 0.0}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            used = process.memory_full_info()
            found["all"] += used.pss / 1e6
            if "ServeReplica" in " ".join(process.cmdline()):
                found["replica"] = max(found["replica"], used.rss / 1e6)
    return found


async def through(url: str, engine: Engine, rounds: int) -> list[Row]:
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_SEC) as client:
        return [row for clients in (1, 8) for row in await first_token(client, engine, clients, rounds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model and few rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    parser.add_argument("--model", type=Path, help="a model folder with a tokenizer")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        folder = measured_model(options.model, options.quick, Path(scratch))
        weights = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6
        with command(folder, Path(scratch) / "log") as (url, seconds):
            used = memory()
            rows = [
                compare("cold start to an answer", "s", seconds, START_SEC, "asked for"),
                compare(f"replica, weights of {weights:.0f} MB", "MB held", used["replica"], MEMORY_MB, "asked for"),
                compare("all processes of the command", "MB", used["all"], MEMORY_MB, "asked for"),
            ]
            torch.set_num_threads(1)
            engine = Engine(folder, EngineConfig(prefix_cache=False))
            rows += asyncio.run(through(url, engine, 2 if options.quick else 15))
    notes = [f"load average {load:.1f} before and {os.getloadavg()[0]:.1f} after"]
    report(rows, options.json, "sundog serve", notes)


if __name__ == "__main__":
    main()
