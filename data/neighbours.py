"""The k nearest documents by cosine: exact for few documents, by cells, an inverted file or a graph for more.

``auto`` searches everything up to 20,000 documents, then joins ``cells`` (``data.neighbours_cells``), which holds a few
thousand vectors at a time. The indexes hold all vectors while they are built: ``ivf``, an inverted file (about
sqrt(documents) cells, a sixteenth probed at most) that every worker maps, and ``hnsw`` (Malkov & Yashunin 2018).

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
from data.groups import MISSING, Floats, Groups, Ints, group_names, group_rows, map_groups, write_groups
from data.shards import write_array
from data.stages import RunUnits, Stage, Unit, record_files, unit
from data.vectors import Vectors, load_vectors

INDEX = "index.faiss"
SLACK = 8  # candidates beyond k: room for equal similarities at the border
FETCH = 1024  # candidates at most; ties beyond are broken as the index gives them
DECIMALS = 6  # of a similarity: float32 sums that differ in their last bits only are equal
EXACT = 20_000  # documents, at most, that are searched exactly
QUERIES = 16_384  # documents whose neighbours one unit finds
PROBES = 16  # cells that a query looks into
TRAIN = 64  # vectors a cell that centroids are trained on


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


def _sorted(found: Ints, similarities: Floats, own: npt.NDArray[Any]) -> tuple[Ints, npt.NDArray[np.float64]]:
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
    return ("flat" if documents <= EXACT else "cells") if kind == "auto" else kind


def search(vectors: Floats, k: int) -> tuple[Ints, Floats]:
    """Neighbours of every row in memory: ids and similarities ``[rows, k]``; no zero vector is anybody's neighbour."""
    groups = group_rows(len(vectors), lambda first, last: vectors[first:last])
    index, own = make_index(vectors[groups.first], "flat"), np.arange(len(vectors))
    return among_groups(*look_up(index, vectors, groups.group, k), own, vectors, groups)


def look_up(index: Any, queries: Floats, own: npt.NDArray[Any], k: int) -> tuple[Ints, Floats]:
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
    kind = shared["index"]
    ranges = [(first, min(first + QUERIES, documents)) for first in range(0, documents, QUERIES)]
    queries = [{**shared, "number": i, "first": first, "last": last} for i, (first, last) in enumerate(ranges)]
    if kind == "flat":
        return run_units("order: neighbours", "data.neighbours:exact_unit", stage.units("neighbours", queries))
    grouped = group_documents(stage, shared, documents, run_units)
    built = run_units("order: index", "data.neighbours:index_unit", stage.units("index", [shared]))
    searched = run_units("order: neighbours", "data.neighbours:search_unit", stage.units("neighbours", queries))
    return [*grouped, *built, *searched]


def group_documents(stage: Stage, shared: Unit, documents: int, run_units: RunUnits) -> list[Unit]:
    """Writes who shares a vector; ``distinct`` in the one result: how many vectors there are."""
    work = stage.units("groups", [{**shared, "documents": documents}])
    return run_units("order: equal vectors", "data.neighbours:groups_unit", work)


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
def groups_unit(work: Unit) -> Unit:
    """Who shares a vector."""
    groups = group_rows(
        work["documents"], lambda first, last: load_vectors(work["embedded"], work["parts"], first, last)
    )
    write_groups(Path(work["folder"]), groups)
    return {"distinct": len(groups.first), "files": record_files(work["folder"], group_names())}


@unit
def index_unit(work: Unit) -> Unit:
    """Builds the index over distinct vectors, all of them in memory."""
    faiss.omp_set_num_threads(1)
    folder = Path(work["folder"])
    vectors = Vectors(work["embedded"], work["parts"])(map_groups(folder).first)
    with atomic_path(folder / INDEX) as temporary:
        faiss.write_index(make_index(vectors, work["index"]), str(temporary))
    return {"files": record_files(folder, [INDEX])}


@unit
def search_unit(work: Unit) -> Unit:
    """Neighbours of the documents ``first:last`` by the index."""
    faiss.omp_set_num_threads(1)
    folder, own = Path(work["folder"]), np.arange(work["first"], work["last"])
    groups = map_groups(folder)
    flags = faiss.IO_FLAG_MMAP if work["index"] == "ivf" else 0
    index: Any = faiss.read_index(str(folder / INDEX), flags)
    vectors = load_vectors(work["embedded"], work["parts"], work["first"], work["last"])
    found = look_up(index, vectors, groups.group[own], work["k"])
    return write_neighbours(work, *among_groups(*found, own, vectors, groups))


def among_groups(found: Ints, similarities: Floats, own: Ints, vectors: Floats, groups: Groups) -> tuple[Ints, Floats]:
    """Neighbours of the rows ``own``: those that follow in a row's group, then the first of each group ``found``.

    Rows whose ``vectors`` are zero have no mates.
    """
    k = found.shape[1]
    mates = np.where(np.any(vectors, axis=1, keepdims=True), groups.mates(own, k), MISSING)
    ids = np.concatenate([mates, np.where(found < 0, MISSING, groups.first[found])], axis=1)
    scores = np.concatenate([np.where(mates < 0, 0, 1).astype(np.float32), similarities], axis=1)
    order = np.argsort(ids < 0, axis=1, kind="stable")[:, :k]
    rows = np.arange(len(own))[:, None]
    return ids[rows, order], scores[rows, order]
