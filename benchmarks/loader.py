"""The loader's speed from the page cache, and its start at a far-off step.

python -m benchmarks.loader [--windows 20000] [--context 8192]
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from data.loader import Loader
from data.manifest import Manifest, write_manifest
from data.permutation import permute
from data.shards import open_shards, shard_names, write_shard
from data.stages import record_files


def main() -> None:
    """Packs random tokens, reads them in shuffled batches and prints the rates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=4_000)
    parser.add_argument("--context", type=int, default=8_192)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, 50_000, 1_000_000).astype(np.uint16)
    lengths = rng.integers(200, 4_000, arguments.windows * arguments.context // 2_100)
    documents = ((i, tokens[: lengths[i]]) for i in range(len(lengths)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        counts = write_shard(folder, 0, documents, arguments.context, 50_000, 1, packing="soft")
        figures = {"vocab_size": 50_000, "eos_id": 0, "pad_id": 1, "shard_windows": [counts["windows"]]}
        settings, files = {"context": arguments.context, "tokenizer": "0" * 64}, record_files(folder, shard_names(0))
        write_manifest(folder, Manifest("pack", "f" * 64, "", settings, figures, files, "2026-01-01T00:00:00+00:00"))
        for attention in ("context", "document"):
            loader = Loader(open_shards(folder), 8, 0, attention, 0.02)
            steps, seconds = counts["windows"] // 8, 0.0
            for _ in range(2):  # the first pass fills the page cache
                start = time.process_time()
                for step in range(steps):
                    loader.batch(step, 0, 1)
                seconds = time.process_time() - start
            rate = steps * 8 * arguments.context / seconds / 1e6
            print(f"{attention:9s} {rate:8.1f} M tokens per CPU second, all four int64 arrays")
    start = time.perf_counter()
    permute(np.arange(512) + 10**8, 10**9, 0, 3)
    print(f"the windows of a step at 1e9 windows: {(time.perf_counter() - start) * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
