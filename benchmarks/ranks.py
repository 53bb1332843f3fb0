"""A long prompt over two ranks beside one, each with one thread: the same tokens, and their time.

    python -m benchmarks.ranks [--quick] [--json FILE] [--model FOLDER] [--tokens N]

The other rank is a process on this machine, over gloo. Times are elapsed ones, in turns; without a folder the model has
random weights in the sizes of SmolLM2-135M.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.inference import complete, greedy, measured_model
from benchmarks.table import Row, alternate, median_ratio, report
from cluster.local_head import free_port
from conf.serving import EngineConfig
from inference.engine import Engine

FOLLOW = """import json, sys, torch
from inference.ranks import follow
torch.set_num_threads(1)
follow({"model": sys.argv[1], "engine": json.loads(sys.argv[2])})
torch.distributed.destroy_process_group()"""


@contextmanager
def two_ranks(folder: Path, settings: EngineConfig, max_running: int) -> Iterator[Engine]:
    """An engine whose other rank is a process of its own."""
    values = {**vars(settings), "ranks": 2}
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-c", FOLLOW, str(folder), json.dumps(values)]
    other = subprocess.Popen(command, env={**os.environ, **place, "RANK": "1"})
    os.environ |= place | {"RANK": "0"}
    try:
        engine = Engine(folder, EngineConfig(**values), max_running)
        yield engine
        engine.close()
        assert other.wait(60) == 0, "the other rank failed"
    finally:
        other.kill()
        other.wait()
    dist.destroy_process_group()


def run(folder: Path, tokens: int, rounds: int) -> list[Row]:
    settings = EngineConfig(prefix_cache=False, kv_tokens=2 * tokens + 1024)
    alone = Engine(folder, settings, 1)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(1, alone.spec.vocab_size, (tokens,), generator=generator).tolist()
    with two_ranks(folder, settings, 1) as both:
        ways = {"2 ranks": both, "1 rank": alone}
        runs = {name: lambda engine=engine: complete(engine, [prompt], greedy(4)) for name, engine in ways.items()}
        assert runs["2 ranks"]() == runs["1 rank"](), "two ranks gave other tokens"
        times = alternate(runs, rounds)
    seconds = [statistics.median(times[name].wall) for name in runs]
    ratio = median_ratio(times["2 ranks"].wall, times["1 rank"].wall)
    return [Row(f"four tokens behind a prompt of {tokens}", "s", seconds[0], seconds[1], "1 rank", ratio)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, a short prompt, one round")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    parser.add_argument("--model", type=Path, help="a model folder with a tokenizer")
    parser.add_argument("--tokens", type=int, default=4000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        folder = measured_model(options.model, options.quick, Path(scratch))
        rows = run(folder, *((300, 1) if options.quick else (options.tokens, 3)))
    notes = [f"one thread a rank; load average {load:.1f} before and {os.getloadavg()[0]:.1f} after"]
    report(rows, options.json, "A prompt over ranks", notes)


if __name__ == "__main__":
    main()
