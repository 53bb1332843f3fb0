"""Orders of documents beside the public code's sort: CPU seconds, jumps, similarity of neighbours, memory.

    python -m benchmarks.order [--documents 1000000] [--k 20] [--peer FOLDER] [--partitions 16 64 256]

On a synthetic corpus in clusters of very unequal sizes. The peer is the sorter of the public In-Context Pretraining
code: ``git clone https://github.com/swj0419/in-context-pretraining FOLDER``. As its release stops with a NameError in
the constructor, the benchmark sets the fields that ``sort`` reads, stands in for ``ipdb``, and leaves writing and
progress bars out. The same loop written plainly (``tests/helpers/orders.py``) always runs. Both must give our chains,
bit for bit.
"""

import argparse
import importlib.util
import multiprocessing
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import faiss
import numpy as np

from data.metrics import adjacent_similarity, jumps
from data.neighbours import QUERIES, make_index
from data.orders import ORDERS
from data.orders.graph import Lists
from data.orders.matching import join_fragments, settle
from data.orders.partitioned import assign, match_partition
from data.orders.reference import chained
from tests.helpers.orders import reference_chains

Array = np.ndarray[Any, Any]
PART = QUERIES  # documents in a file of neighbour lists, as the stage writes them, where memory is measured
POLL_SEC = 0.002


def synthetic(documents: int, k: int) -> tuple[Array, Array, Array]:
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


def public_sorter(folder: Path, ids: Array, scratch: Path) -> Any:
    """The public code's sorter over neighbour lists; its constructor does not run, so its fields are set here."""
    os.environ["TQDM_DISABLE"] = "1"
    sys.modules.setdefault("ipdb", ModuleType("ipdb")).__dict__["set_trace"] = breakpoint
    sys.path.insert(0, str(folder / "sort"))
    spec = importlib.util.spec_from_file_location("public_sort", folder / "sort" / "sort.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.__dict__["pickle_dump"] = lambda *_: None
    itself = np.arange(len(ids), dtype=np.int64)[:, None]  # as the nearest, which the sorter skips
    np.save(scratch / "I0000000000_IVF32768_PQ256_np64.npy", np.concatenate([itself, ids], axis=1, dtype=np.int64))
    sorter = object.__new__(module.sort_class)
    fields = {"num_docs": len(ids), "seen_docs": set(), "unseen_docs": set(range(len(ids))), "output_file": ""}
    fields |= {"knn_dir": str(scratch), "file_name_base": "I0000000000", "num_docs_per_file": 50_000_000}
    fields |= {"all_knns": [], "cluster_size": 21, "cluster2docs": defaultdict(list), "doc2cluster": {}}
    sorter.__dict__.update(fields)
    return sorter


def walk_from_files(connection: Any, files: list[tuple[Path, Path]], kind: str) -> None:
    """In a process of its own: compiles for mapped files, says so, waits, orders the documents of the files."""
    first = files[0][0].with_name("first.npy"), files[0][1].with_name("first_similarities.npy")
    np.save(first[0], np.zeros((2, 1), np.int32))
    np.save(first[1], np.ones((2, 1), np.float32))
    ORDERS[kind](Lists([first]), lambda d: np.ones((len(d), 2)))
    connection.send(None)
    connection.recv()
    ORDERS[kind](Lists(files), lambda d: np.ones((len(d), 2)))
    connection.send(None)


def resident(pid: int) -> int:
    """Bytes of a process in memory, mapped files included."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_growth(ids: Array, similarities: Array, kind: str, scratch: Path) -> int:
    """Bytes that a process grows by, at most, while it orders documents from files of neighbour lists."""
    files = []
    for first in range(0, len(ids), PART):
        files.append((scratch / f"ids{first}.npy", scratch / f"similarities{first}.npy"))
        np.save(files[-1][0], ids[first : first + PART])
        np.save(files[-1][1], similarities[first : first + PART])
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=walk_from_files, args=(there, files, kind))
    process.start()
    there.close()  # so that the end of a process that fails is seen
    here.recv()
    before = peak = resident(process.pid or 0)
    here.send(None)
    while not here.poll(POLL_SEC):
        peak = max(peak, resident(process.pid or 0))
    process.join()
    return peak - before


def partitioned(lists: Lists, vectors: Array, partitions: int) -> Array:
    """The order of ``matching`` with fragments made partition by partition."""
    where = assign(len(vectors), vectors.__getitem__, partitions)
    pieces = [match_partition(lists, np.flatnonzero(where == number)) for number in range(partitions)]
    bounds = np.concatenate([[0], np.cumsum(np.concatenate([np.diff(bounds) for _, bounds in pieces]))])
    with tempfile.TemporaryDirectory() as scratch:
        path = np.concatenate([path for path, _ in pieces])
        path = join_fragments(path, bounds, vectors.__getitem__, Path(scratch))
    return settle(path, lists.neighbours())


def flat(chains: Any) -> list[int]:
    """Documents of chains, one after another."""
    return [int(document) for chain in chains for document in chain]


def compare_chains(ids: Array, peer: Path | None) -> None:
    """Our chains beside the plain loop's and the public code's."""
    path, ours = timed(lambda: chained(ids))
    for _ in range(9):
        ours = min(ours, timed(lambda: chained(ids))[1])
    chains, slow = timed(lambda: reference_chains(ids))  # pyright: ignore[reportArgumentType]
    equal = path.tolist() == flat(chains)
    print(f"chains, ours {ours:.4f} s; plain loop {slow:.2f} s, {slow / ours:.0f}x, equal: {equal}")
    if peer is None:
        print("chains, public code: not measured; --peer FOLDER (see --help)")
        return
    with tempfile.TemporaryDirectory() as scratch:
        sorter = public_sorter(peer, ids, Path(scratch))
        _, slow = timed(sorter.sort)
    equal = path.tolist() == flat(sorter.cluster2docs.values())
    print(f"chains, public code's sort() {slow:.2f} s, {slow / ours:.0f}x ours, equal: {equal}")


def main() -> None:
    """Runs the comparison and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--peer", type=Path, help="checkout of the public code")
    parser.add_argument("--partitions", type=int, nargs="*", default=[], help="of matching, beside the whole")
    parser.add_argument("--kinds", nargs="*", choices=ORDERS, default=list(ORDERS))
    arguments = parser.parse_args()
    small = np.random.default_rng(1).integers(0, 100, (100, arguments.k)).astype(np.int32)
    for order in ORDERS.values():  # compiled before the clock starts
        order(Lists([(small, np.ones(small.shape, dtype=np.float32))]), lambda d: np.ones((len(d), 4), np.float32))
    chained(small)
    vectors, ids, similarities = synthetic(arguments.documents, arguments.k)
    compare_chains(ids, arguments.peer)
    lists = Lists([(ids, similarities)])
    print(f"{'order':16s} {'CPU s':>8s} {'jumps':>9s} {'adjacent':>9s}")

    def row(name: str, order: Callable[[], Array]) -> None:
        path, seconds = timed(order)
        broken = int(jumps(ids, path.astype(np.int64)).sum())
        similar = adjacent_similarity(vectors.__getitem__, path.astype(np.int64))
        print(f"{name:16s} {seconds:8.2f} {broken:9,d} {similar:9.4f}")

    for kind in arguments.kinds:
        row(kind, lambda kind=kind: ORDERS[kind](lists, vectors.__getitem__))
    for number in arguments.partitions:
        row(f"matching / {number}", lambda number=number: partitioned(lists, vectors, number))
    with tempfile.TemporaryDirectory() as scratch:
        grown = peak_growth(ids, similarities, "algorithm1", Path(scratch))
    print(f"algorithm1 grows by {grown / len(ids):.0f} bytes a document at most, graph and mapped lists included")


if __name__ == "__main__":
    main()
