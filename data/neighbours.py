"""The k nearest documents by cosine: exact for few documents, by an inverted file or a navigable graph for more.

``auto`` searches everything up to 20,000 documents, then an inverted file (about sqrt(documents) cells, a sixteenth
probed at most), built once and mapped by every worker. ``hnsw`` (Malkov & Yashunin 2018) is the choice where queries
are many and dimensions few. ``cells`` is for many nodes: ``data.neighbours_cells``.

Documents without a vector (all zeros: no known word, or what was not a number) have no neighbours and are nobody's. Of
documents with the same vector, or nearly so, only one is indexed, so that a million copies of a page cost what one does
and fill no cell: each of them gets those that follow it in its group, then the neighbours of the one.
"""

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from data.files import atomic_path
from data.shards import write_array
from data.stages import RunUnits, Stage, Unit, record_files, unit
from data.vectors import load_vectors

MISSING = -1  # id where a document has fewer than k neighbours
SLACK = 8  # candidates beyond k: room for equal similarities at the border
FETCH = 1024  # candidates at most; ties beyond are broken as the index gives them
DECIMALS = 6  # of a similarity: float32 sums that differ in their last bits only are equal
EXACT = 20_000  # documents, at most, that are searched exactly
QUERIES = 16_384  # documents whose neighbours one unit finds
GRAIN = 1024  # vectors that agree to 1 / GRAIN in every dimension are one: their cosine is 1 - dims / 2^21 at least
PROBES = 16  # cells that a query looks into
TRAIN = 64  # vectors a cell that centroids are trained on
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


def nearest(vectors: Floats, first: int, last: int, k: int) -> tuple[Ints, Floats]:
    """The ``k`` nearest rows of ``vectors`` (unit length) to each of the rows ``first:last``, without itself; exact.

    Returns ids int64 and similarities float32, both ``[last - first, k]``, by similarity descending, then id ascending;
    -1 and 0 where there are fewer than ``k`` other rows.
    """
    documents = len(vectors)
    ids = np.full((last - first, k), MISSING, dtype=np.int64)
    similarities = np.zeros((last - first, k), dtype=np.float32)
    wanted = min(k, documents - 1)
    if wanted < 1 or first >= last:
        return ids, similarities
    index: Any = faiss.IndexFlatIP(vectors.shape[1])
    index.add(np.ascontiguousarray(vectors))
    most = min(documents, max(FETCH, wanted + 1 + SLACK))
    pending, fetch = np.arange(first, last), min(documents, wanted + 1 + SLACK)
    while pending.size:
        found_similarities, found = index.search(np.ascontiguousarray(vectors[pending]), fetch)
        found, scores = _sorted(found, found_similarities, pending)
        # Equal similarities may go on beyond what was fetched, with smaller ids: such rows fetch more.
        others = fetch - (scores[:, -1] == -np.inf)
        border = scores[np.arange(len(pending)), others - 1]
        done = (scores[:, wanted - 1] > border) | (fetch == most)
        ids[pending[done] - first, :wanted] = found[done, :wanted]
        similarities[pending[done] - first, :wanted] = scores[done, :wanted]
        pending, fetch = pending[~done], min(most, 2 * fetch)
    return ids, similarities


def _sorted(found: Ints, similarities: Floats, own: Ints) -> tuple[Ints, npt.NDArray[np.float64]]:
    """Candidates by rounded similarity descending, then id; the query itself and what was not found come last."""
    scores = np.round(similarities.astype(np.float64), DECIMALS)
    scores[(found == own[:, None]) | (found < 0)] = -np.inf
    rows, order = np.arange(len(found))[:, None], np.lexsort((found, -scores), axis=1)
    return found[rows, order], scores[rows, order]


def make_index(vectors: Floats, kind: str) -> Any:
    """A faiss index over unit vectors: ``flat``, ``ivf`` or ``hnsw``."""
    documents, dims = vectors.shape
    if kind == "flat":
        index: Any = faiss.IndexFlatIP(dims)
    elif kind == "hnsw":
        index = faiss.IndexHNSWFlat(dims, 16, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = 80, 80
    else:
        cells = max(1, int(np.sqrt(documents)))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dims), dims, cells, faiss.METRIC_INNER_PRODUCT)
        index.cp.seed, index.cp.min_points_per_centroid, index.nprobe = 0, 1, PROBES
        index.train(np.ascontiguousarray(vectors[:: max(1, documents // (cells * TRAIN))]))
    index.add(np.ascontiguousarray(vectors))
    return index


def index_kind(kind: str, documents: int) -> str:
    """What ``auto`` stands for."""
    return ("flat" if documents <= EXACT else "ivf") if kind == "auto" else kind


def search(vectors: Floats, k: int) -> tuple[Ints, Floats]:
    """Neighbours of every row in memory: ids and similarities ``[rows, k]``; no zero vector is anybody's neighbour."""
    first, group, members = grouped(vectors)
    index = make_index(vectors[first], index_kind("auto", len(first)))
    return among_groups(index, vectors, np.arange(len(vectors)), (first, group, members), k)


def look_up(index: Any, queries: Floats, own: Ints, k: int) -> tuple[Ints, Floats]:
    """The ``k`` nearest of the index to each query, without ``own`` and without zero vectors (similarity 0 to all)."""
    fetch = min(index.ntotal, k + 1 + SLACK)
    similarities, found = index.search(np.ascontiguousarray(queries), fetch)
    found, scores = _sorted(found, similarities, own)
    if (short := k - found.shape[1]) > 0:
        found, scores = (
            np.pad(found, ((0, 0), (0, short))),
            np.pad(scores, ((0, 0), (0, short)), constant_values=-np.inf),
        )
    found, scores = found[:, :k], scores[:, :k]
    lost = (scores == -np.inf) | (scores == 0.0)
    return np.where(lost, MISSING, found), np.where(lost, 0, scores).astype(np.float32)


def find_neighbours(stage: Stage, shared: Unit, documents: int, run_units: RunUnits) -> list[Unit]:
    """Neighbour lists of all documents; ``shared`` has ``embedded``, ``parts``, ``k`` and ``index``."""
    kind = index_kind(shared["index"], documents)
    shared = {**shared, "index": kind}
    ranges = [(first, min(first + QUERIES, documents)) for first in range(0, documents, QUERIES)]
    queries = [{**shared, "number": i, "first": first, "last": last} for i, (first, last) in enumerate(ranges)]
    if kind == "flat":
        return run_units("order: neighbours", "data.neighbours:exact_unit", stage.units("neighbours", queries))
    built = run_units("order: index", "data.neighbours:index_unit", stage.units("index", [shared]))
    return built + run_units("order: neighbours", "data.neighbours:search_unit", stage.units("neighbours", queries))


def neighbour_names(number: int) -> tuple[str, str]:
    """Files of one range of documents: ids int32 and similarities float32, ``[documents, k]``."""
    return f"neighbours-{number:05d}.npy", f"similarities-{number:05d}.npy"


def write_neighbours(work: Unit, ids: Ints, similarities: Floats) -> Unit:
    """Writes one range; the unit's result."""
    names = neighbour_names(work["number"])
    write_array(Path(work["folder"]) / names[0], ids.astype(np.int32))
    write_array(Path(work["folder"]) / names[1], similarities.astype(np.float32))
    return {"isolated": int((ids < 0).all(axis=1).sum()), "files": record_files(work["folder"], names)}


@unit
def exact_unit(work: Unit) -> Unit:
    """Exact neighbours of the documents ``first:last``."""
    faiss.omp_set_num_threads(1)  # a worker is one of several on the machine
    ids, similarities = nearest(load_vectors(work["embedded"], work["parts"]), work["first"], work["last"], work["k"])
    ids[similarities == 0] = MISSING
    return write_neighbours(work, ids, similarities)


@unit
def index_unit(work: Unit) -> Unit:
    """Builds the index over distinct vectors; ``groups.npz`` says who shares one."""
    faiss.omp_set_num_threads(1)
    folder, vectors = Path(work["folder"]), load_vectors(work["embedded"], work["parts"])
    first, group, members = grouped(vectors)
    with atomic_path(folder / "groups.npz") as temporary, open(temporary, "wb") as file:
        np.savez(file, first=first, group=group, members=members)
    with atomic_path(folder / "index.faiss") as temporary:
        faiss.write_index(make_index(vectors[first], work["index"]), str(temporary))
    return {"distinct": len(first), "files": record_files(folder, ["groups.npz", "index.faiss"])}


def distinct(vectors: Floats) -> tuple[Ints, Ints]:
    """Of rows equal to 1 / GRAIN the first, and every row's group; by two 64-bit sums of products, mod 2^64."""
    odd = np.random.default_rng(0).integers(1, 2**63, (2, vectors.shape[1]), dtype=np.uint64)
    odd = odd * np.uint64(2) + np.uint64(1)
    keys = np.empty((len(vectors), 2), dtype=np.uint64)
    for start in range(0, len(vectors), QUERIES):
        rows = np.rint(vectors[start : start + QUERIES] * GRAIN).astype(np.int64).view(np.uint64)
        keys[start : start + QUERIES] = rows @ odd.T
    _, first, group = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    return first, group.reshape(-1)


@unit
def search_unit(work: Unit) -> Unit:
    """Neighbours of the documents ``first:last`` by the index."""
    faiss.omp_set_num_threads(1)
    folder, k = Path(work["folder"]), work["k"]
    stored = np.load(folder / "groups.npz")
    first, group, members = stored["first"], stored["group"], stored["members"]
    flags = faiss.IO_FLAG_MMAP if work["index"] == "ivf" else 0
    index: Any = faiss.read_index(str(folder / "index.faiss"), flags)
    own = np.arange(work["first"], work["last"])
    vectors = load_vectors(work["embedded"], work["parts"], work["first"], work["last"])
    return write_neighbours(work, *among_groups(index, vectors, own, (first, group, members), k))


def grouped(vectors: Floats) -> tuple[Ints, Ints, Ints]:
    """Equal rows as groups: the first row of each, ascending, every row's group, and the rows group by group."""
    first, group = distinct(vectors)
    first, place = np.sort(first), np.argsort(np.argsort(first))
    return first, place[group], np.argsort(place[group], kind="stable")


def among_groups(
    index: Any, queries: Floats, own: Ints, groups: tuple[Ints, Ints, Ints], k: int
) -> tuple[Ints, Floats]:
    """Neighbours of the rows ``own``: those that follow in a row's group, then those that the index of firsts finds.

    ``own`` is -1 where the query is no row.
    """
    first, group, members = groups
    found, similarities = look_up(index, queries, np.where(own < 0, MISSING, group[own]), k)
    found = np.where(found < 0, MISSING, first[found])
    equal = (own >= 0) & np.any(queries, axis=1)
    mates = np.where(equal[:, None], _mates(np.maximum(own, 0), group, members, k), MISSING)
    ids = np.concatenate([mates, found], axis=1)
    scores = np.concatenate([np.where(mates < 0, 0, 1).astype(np.float32), similarities], axis=1)
    order = np.argsort(ids < 0, axis=1, kind="stable")[:, :k]
    rows = np.arange(len(own))[:, None]
    return ids[rows, order], scores[rows, order]


def _mates(own: Ints, group: Ints, members: Ints, k: int) -> Ints:
    """Up to ``k`` documents with the same vector, those that follow in the group, round its end; else -1."""
    sizes = np.bincount(group)
    starts = np.cumsum(sizes) - sizes
    place = np.empty(len(group), dtype=np.int64)
    place[members] = np.arange(len(group)) - np.repeat(starts, sizes)
    size, steps = sizes[group[own]][:, None], np.arange(1, k + 1)[None]
    mates = members[starts[group[own]][:, None] + (place[own][:, None] + steps) % size]
    return np.where(steps < size, mates, MISSING)
