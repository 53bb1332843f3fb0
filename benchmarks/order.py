"""Orders of documents beside the public code's sort: CPU seconds, jumps, similarity of neighbours.

    python -m benchmarks.order [--documents 1000000] [--k 20]

On a synthetic corpus in clusters of very unequal sizes. The peer is the loop of the public In-Context Pretraining code
as it is meant (its release stops with a NameError), written plainly: ``tests/helpers/orders.py``. The first lines check
that ours gives the same chains, bit for bit.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np

from data.metrics import adjacent_similarity, jumps
from data.neighbours import make_index
from data.orders import ORDERS
from data.orders.graph import Lists
from data.orders.reference import chained
from tests.helpers.orders import reference_chains


def synthetic(documents: int, k: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Unit vectors ``[documents, 32]`` in clusters of power-law sizes, and their neighbours: ids and similarities."""
    rng = np.random.default_rng(0)
    clusters = max(8, documents // 100)
    sizes = rng.zipf(1.5, clusters).clip(1, max(2, documents // 50)).astype(float)
    centres = rng.normal(size=(max(4, clusters // 50), 32))[rng.integers(0, max(4, clusters // 50), clusters)]
    centres += rng.normal(size=(clusters, 32))
    vectors = centres[rng.choice(clusters, documents, p=sizes / sizes.sum())] + 0.5 * rng.normal(size=(documents, 32))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    faiss.omp_set_num_threads(1)
    index = make_index(vectors, "ivf" if documents > 20_000 else "flat")
    if documents > 20_000:
        index.nprobe = 8
    scores, ids = index.search(vectors, k + 1)
    scores[ids == np.arange(documents)[:, None]] = -2
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return vectors, np.take_along_axis(ids, order, 1).astype(np.int32), np.take_along_axis(scores, order, 1)


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """The result and the CPU seconds of this process."""
    start = time.process_time()
    result = function()
    return result, time.process_time() - start


def main() -> None:
    """Runs the comparison and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--k", type=int, default=20)
    arguments = parser.parse_args()
    small = np.random.default_rng(1).integers(0, 100, (100, arguments.k)).astype(np.int32)
    for order in ORDERS.values():  # compiled before the clock starts
        order(Lists([(small, np.ones(small.shape, dtype=np.float32))]), lambda d: np.ones((len(d), 4), np.float32))
    chained(small)
    vectors, ids, similarities = synthetic(arguments.documents, arguments.k)
    chains, slow = timed(lambda: reference_chains(ids))  # pyright: ignore[reportArgumentType]
    path, fast = timed(lambda: chained(ids))
    equal = path.tolist() == [int(document) for chain in chains for document in chain]
    print(f"chains of the public code: plain loop {slow:.2f} s, ours {fast:.4f} s, {slow / fast:.0f}x, equal: {equal}")
    del chains
    print(f"{'order':12s} {'CPU s':>8s} {'jumps':>9s} {'adjacent':>9s}")
    for kind, order in ORDERS.items():
        path, seconds = timed(lambda order=order: order(Lists([(ids, similarities)]), vectors.__getitem__))
        broken = int(jumps(ids, path.astype(np.int64)).sum())
        similar = adjacent_similarity(vectors.__getitem__, path.astype(np.int64))
        print(f"{kind:12s} {seconds:8.2f} {broken:9,d} {similar:9.4f}")


if __name__ == "__main__":
    main()
