"""Nearest neighbours on many nodes: a join by cells, without a global index.

Centroids are trained on a sample. Every vector is sent to its nearest cell as a base and to its ``PROBES`` nearest
cells as a query; each cell is then one dense product, exact inside; last, a document's lists from all its cells are
merged. Maps and shuffles through files only, so no process holds more than a few cells or one range of documents.
"""

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from data.neighbours import MISSING, QUERIES, Floats, Ints, among_groups, grouped, write_neighbours
from data.shards import write_array
from data.stages import RunUnits, Stage, Unit, record_files, unit
from data.vectors import Vectors, load_vectors

CELL = 4_000  # documents of a cell, about
GROUP = 16  # cells of one unit
PROBES = 8  # cells that a document asks
SAMPLE = 64  # vectors a cell that centroids are trained on


def join_cells(stage: Stage, shared: Unit, documents: int, run_units: RunUnits) -> list[Unit]:
    """Neighbour lists of all documents; ``shared`` has ``embedded``, ``parts`` and ``k``."""
    cells = max(1, documents // CELL)
    groups = -(-cells // GROUP)
    shared = {**shared, "cells": cells, "groups": groups, "probes": min(PROBES, cells)}
    trained = run_units("order: cells", "data.neighbours_cells:train_unit", stage.units("cells", [shared]))
    firsts = range(0, documents, QUERIES)
    ranges = [{**shared, "number": n, "first": f, "last": min(f + QUERIES, documents)} for n, f in enumerate(firsts)]
    sent = run_units("order: send to cells", "data.neighbours_cells:send_unit", stage.units("send", ranges))
    joins = stage.units("join", [{**shared, "group": group, "ranges": len(ranges)} for group in range(groups)])
    joined = run_units("order: join cells", "data.neighbours_cells:join_unit", joins)
    merged = run_units("order: merge", "data.neighbours_cells:merge_unit", stage.units("merge", ranges))
    return [*trained, *sent, *joined, *merged]


@unit
def train_unit(work: Unit) -> Unit:
    """The centroids, float32 ``[cells, dims]``."""
    faiss.omp_set_num_threads(1)
    vectors = Vectors(work["embedded"], work["parts"])
    sample = vectors(np.arange(0, len(vectors), max(1, len(vectors) // (work["cells"] * SAMPLE))))
    means: Any = faiss.Kmeans(
        sample.shape[1], work["cells"], niter=10, seed=0, spherical=True, min_points_per_centroid=1, verbose=False
    )
    means.train(sample)
    write_array(Path(work["folder"]) / "cells.npy", means.centroids)
    return {"files": record_files(work["folder"], ["cells.npy"])}


@unit
def send_unit(work: Unit) -> Unit:
    """Which cells each document of a range asks, nearest first: int32 ``[documents, probes]``; the first holds it."""
    faiss.omp_set_num_threads(1)
    folder, name = Path(work["folder"]), f"sent-{work['number']:05d}.npy"
    vectors = load_vectors(work["embedded"], work["parts"], work["first"], work["last"])
    centroids = np.load(folder / "cells.npy")
    index: Any = faiss.IndexFlatIP(centroids.shape[1])
    index.add(centroids)
    write_array(folder / name, index.search(vectors, work["probes"])[1].astype(np.int32))
    return {"files": record_files(folder, [name])}


@unit
def join_unit(work: Unit) -> Unit:
    """All queries of a group of cells against the cells' documents: rows of (query, ids, similarities) by query."""
    faiss.omp_set_num_threads(1)
    folder, vectors = Path(work["folder"]), Vectors(work["embedded"], work["parts"])
    low, high = work["group"] * GROUP, min((work["group"] + 1) * GROUP, work["cells"])
    asked: list[npt.NDArray[np.int64]] = []
    start = 0
    for number in range(work["ranges"]):
        sent = np.load(folder / f"sent-{number:05d}.npy", mmap_mode="r")
        rows, probes = np.nonzero((sent >= low) & (sent < high))
        asked.append(np.stack([rows + start, sent[rows, probes], probes == 0], axis=1).astype(np.int64))
        start += len(sent)
    table, found = np.concatenate(asked), []
    for cell in range(low, high):
        queries, holds = table[table[:, 1] == cell, 0], table[(table[:, 1] == cell) & (table[:, 2] == 1), 0]
        if queries.size and holds.size:
            found.append(_join(vectors, queries, holds, work["k"]))
    empty = np.zeros((0, work["k"]))
    columns = [np.concatenate(c) for c in zip(*found, strict=True)] if found else [empty[:, 0], empty, empty]
    order = np.argsort(columns[0], kind="stable")
    names = joined_names(work["group"])
    for name, column, dtype in zip(names, columns, (np.int64, np.int32, np.float32), strict=True):
        write_array(folder / name, column[order].astype(dtype))
    return {"files": record_files(folder, names)}


def joined_names(group: int) -> tuple[str, str, str]:
    """Files of one group: queries ascending, ids and similarities."""
    return f"asked-{group:05d}.npy", f"answered-{group:05d}.npy", f"weighed-{group:05d}.npy"


def _join(vectors: Vectors, queries: Ints, holds: Ints, k: int) -> tuple[Ints, Ints, Floats]:
    held = vectors(holds)
    groups = grouped(held)
    index: Any = faiss.IndexFlatIP(held.shape[1])
    index.add(held[groups[0]])
    place = np.searchsorted(holds, queries)
    own = np.where(holds[np.minimum(place, len(holds) - 1)] == queries, place, MISSING)
    found, similarities = among_groups(index, vectors(queries), own, groups, k)
    return queries, np.where(found < 0, MISSING, holds[found]), similarities


@unit
def merge_unit(work: Unit) -> Unit:
    """The best ``k`` of a range's documents over all cells that they asked."""
    folder, first, last, k = Path(work["folder"]), work["first"], work["last"], work["k"]
    pieces: list[tuple[Any, ...]] = []
    for group in range(work["groups"]):
        queries, ids, similarities = (np.load(folder / name, mmap_mode="r") for name in joined_names(group))
        low, high = np.searchsorted(queries, [first, last])
        pieces.append((np.repeat(queries[low:high], k), ids[low:high].ravel(), similarities[low:high].ravel()))
    query, target, weight = (np.concatenate(column) for column in zip(*pieces, strict=True))
    real = target >= 0
    query, target, weight = query[real] - first, target[real], weight[real]
    order = np.lexsort((target, -weight, query))
    query, target, weight = query[order], target[order], weight[order]
    counts = np.bincount(query, minlength=last - first)
    rank = np.arange(len(query)) - np.repeat(np.cumsum(counts) - counts, counts)
    ids = np.full((last - first, k), MISSING, dtype=np.int64)
    similarities = np.zeros((last - first, k), dtype=np.float32)
    kept = rank < k
    ids[query[kept], rank[kept]], similarities[query[kept], rank[kept]] = target[kept], weight[kept]
    return write_neighbours(work, ids, similarities)
