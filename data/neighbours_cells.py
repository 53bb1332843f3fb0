"""Nearest neighbours by a join of cells: without a global index, for one node or many.

Centroids are trained on a sample of the distinct vectors. Each of these is sent to its nearest cell as a base and to
its ``PROBES`` nearest cells as a query; each cell is then one dense product, exact inside; last, a document's lists
from all its cells are merged. Maps and shuffles through files only, so no process holds more than a few cells or one
range of documents.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from data.groups import MISSING, Floats, Ints, map_groups
from data.neighbours import QUERIES, among_groups, group_documents, look_up, make_index, write_neighbours
from data.shards import write_array
from data.stages import RunUnits, Stage, Unit, record_files, unit
from data.vectors import Vectors, load_vectors

CELL = 4_000  # vectors of a cell, about
GROUP = 8  # cells of one unit
HELD = 65_536  # vectors of a cell at once
PROBES = 8  # cells that a vector asks
SAMPLE = 64  # vectors a cell that centroids are trained on


def join_cells(stage: Stage, shared: Unit, documents: int, run_units: RunUnits) -> list[Unit]:
    """Neighbour lists of all documents; ``shared`` has ``embedded``, ``parts`` and ``k``."""
    grouped = group_documents(stage, shared, documents, run_units)
    distinct = grouped[0]["distinct"]
    cells = max(1, distinct // CELL)
    groups = -(-cells // GROUP)
    shared = {**shared, "cells": cells, "groups": groups, "probes": min(PROBES, cells)}
    trained = run_units("order: cells", "data.neighbours_cells:train_unit", stage.units("cells", [shared]))
    ranges = _ranges(shared, distinct)
    sent = run_units("order: send to cells", "data.neighbours_cells:send_unit", stage.units("send", ranges))
    joins = stage.units("join", [{**shared, "group": group, "ranges": len(ranges)} for group in range(groups)])
    joined = run_units("order: join cells", "data.neighbours_cells:join_unit", joins)
    merges = stage.units("merge", _ranges(shared, documents))
    merged = run_units("order: merge", "data.neighbours_cells:merge_unit", merges)
    return [*grouped, *trained, *sent, *joined, *merged]


def _ranges(shared: Unit, rows: int) -> list[Unit]:
    firsts = range(0, rows, QUERIES)
    return [{**shared, "number": n, "first": f, "last": min(f + QUERIES, rows)} for n, f in enumerate(firsts)]


@unit
def train_unit(work: Unit) -> Unit:
    """The centroids, float32 ``[cells, dims]``."""
    faiss.omp_set_num_threads(1)
    first = map_groups(Path(work["folder"])).first
    chosen = first[:: max(1, len(first) // (work["cells"] * SAMPLE))]
    sample = Vectors(work["embedded"], work["parts"])(chosen)
    means: Any = faiss.Kmeans(
        sample.shape[1], work["cells"], niter=10, seed=0, spherical=True, min_points_per_centroid=1, verbose=False
    )
    means.train(sample)
    write_array(Path(work["folder"]) / "cells.npy", means.centroids)
    return {"files": record_files(work["folder"], ["cells.npy"])}


@unit
def send_unit(work: Unit) -> Unit:
    """Which cells each of a range of groups asks, nearest first: int32 ``[groups, probes]``; the first holds it."""
    faiss.omp_set_num_threads(1)
    folder, name = Path(work["folder"]), f"sent-{work['number']:05d}.npy"
    vectors = Vectors(work["embedded"], work["parts"])(map_groups(folder).first[work["first"] : work["last"]])
    centroids = np.load(folder / "cells.npy")
    index: Any = faiss.IndexFlatIP(centroids.shape[1])
    index.add(centroids)
    write_array(folder / name, index.search(vectors, work["probes"])[1].astype(np.int32))
    return {"files": record_files(folder, [name])}


@unit
def join_unit(work: Unit) -> Unit:
    """All queries of some cells against the cells' groups: rows of (query, ids, similarities) by query."""
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
    table, first, found = np.concatenate(asked), map_groups(folder).first, []
    for cell in range(low, high):
        queries, holds = table[table[:, 1] == cell, 0], table[(table[:, 1] == cell) & (table[:, 2] == 1), 0]
        if queries.size and holds.size:
            found += _join(lambda groups: vectors(first[groups]), queries, holds, work["k"])
    empty = np.zeros((0, work["k"]))
    columns = [np.concatenate(c) for c in zip(*found, strict=True)] if found else [empty[:, 0], empty, empty]
    order = np.argsort(columns[0], kind="stable")
    names = joined_names(work["group"])
    for name, column, dtype in zip(names, columns, (np.int32, np.int32, np.float32), strict=True):
        write_array(folder / name, column[order].astype(dtype))
    return {"files": record_files(folder, names)}


def joined_names(group: int) -> tuple[str, str, str]:
    """Files of some cells: queries ascending, ids and similarities."""
    return f"asked-{group:05d}.npy", f"answered-{group:05d}.npy", f"weighed-{group:05d}.npy"


def _join(
    vectors: Callable[[Ints], Floats], queries: Ints, holds: Ints, k: int
) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], Floats]]:
    """One cell, a block of what it holds and of its queries at a time: where all are alike it holds most of them."""
    for begin in range(0, len(holds), HELD):
        held = holds[begin : begin + HELD]
        index = make_index(vectors(held), "flat")
        for start in range(0, len(queries), QUERIES):
            asking = queries[start : start + QUERIES]
            place = np.minimum(np.searchsorted(held, asking), len(held) - 1)
            own = np.where(held[place] == asking, place, MISSING)
            found, similarities = look_up(index, vectors(asking), own, k)
            yield asking.astype(np.int32), np.where(found < 0, MISSING, held[found]).astype(np.int32), similarities


@unit
def merge_unit(work: Unit) -> Unit:
    """The best ``k`` of a range's documents over all cells that their groups asked."""
    folder, own, k = Path(work["folder"]), np.arange(work["first"], work["last"]), work["k"]
    groups = map_groups(folder)
    wanted, place = np.unique(groups.group[own], return_inverse=True)
    pieces: list[tuple[Any, ...]] = []
    for number in range(work["groups"]):
        queries, ids, similarities = (np.load(folder / name, mmap_mode="r") for name in joined_names(number))
        low, high = (np.searchsorted(queries, wanted, side=side) for side in ("left", "right"))
        counts = high - low
        rows = np.repeat(low - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        pieces.append((np.repeat(np.arange(len(wanted)), counts * k), ids[rows].ravel(), similarities[rows].ravel()))
    query, target, weight = (np.concatenate(column) for column in zip(*pieces, strict=True))
    real = target >= 0
    query, target, weight = query[real], target[real], weight[real]
    order = np.lexsort((target, -weight, query))
    query, target, weight = query[order], target[order], weight[order]
    counts = np.bincount(query, minlength=len(wanted))
    rank = np.arange(len(query)) - np.repeat(np.cumsum(counts) - counts, counts)
    ids = np.full((len(wanted), k), MISSING, dtype=np.int64)
    similarities = np.zeros((len(wanted), k), dtype=np.float32)
    kept = rank < k
    ids[query[kept], rank[kept]], similarities[query[kept], rank[kept]] = target[kept], weight[kept]
    vectors = load_vectors(work["embedded"], work["parts"], work["first"], work["last"])
    return write_neighbours(work, *among_groups(ids[place], similarities[place], own, vectors, groups))
