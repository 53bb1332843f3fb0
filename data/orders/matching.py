"""Recursive matching of fragments: the default order.

1. Documents are matched along the edges of the neighbour graph for three levels (``data.orders.fragments``): fragments
   of up to eight documents, each next to its best free neighbour.
2. Fragments are matched in the same way along the nearest neighbours of their mean vectors, two levels at a time, and
   what comes of it again, until one is left. So a window of any length holds whole branches of a hierarchy: a path
   alone, which only ever looks at its end, wanders off within a window of a hundred documents.
3. Every fragment is turned so that the ends that meet are the most similar: exact, by dynamic programming.
4. Documents without one of their own nearest beside them are put next to the one that suits best (``_settle``).

The result is a function of the lists and vectors alone: not of how they are split, nor of the number of workers.
"""

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import numba
import numpy as np

from data.neighbours import EXACT, neighbour_names, search
from data.neighbours_cells import join_cells
from data.orders.fragments import fragments
from data.orders.graph import Array, Graph, Int, Lists, build_graph
from data.stages import Stage, serial_units

DOCUMENT_LEVELS, FRAGMENT_LEVELS = 3, 2  # of matching before a fragment is seen as one
NEAREST = 10  # neighbours of a fragment
REACH = 2  # documents to either side within which one of a document's own nearest is looked for
PASSES = 6  # of settling: a document that moves may leave another alone
ROWS = 16_384  # vectors at once


def match_documents(graph: Graph) -> tuple[Array, Array]:
    """Step 1: the documents fragment by fragment, and the fragments' bounds."""
    return fragments(graph, DOCUMENT_LEVELS)


def join_fragments(path: Array, bounds: Array, vectors: Callable[[Array], Array], scratch: Path) -> Array:
    """Steps 2 and 3: the documents of all fragments in order. ``vectors(numbers)`` gives unit vectors.

    What is as large as all fragments' vectors goes to the folder ``scratch``.
    """
    if len(path) == 0:
        return path
    order = _hierarchy(_sums(path, bounds, vectors, scratch / "sums-00.npy"), scratch)
    heads, tails = path[bounds[:-1][order]], path[bounds[1:][order] - 1]
    along = _products(tails[:-1], heads[1:], vectors), _products(tails[:-1], tails[1:], vectors)
    against = _products(heads[:-1], heads[1:], vectors), _products(heads[:-1], tails[1:], vectors)
    return _lay(path, bounds, order, _turns(np.stack([*along, *against], axis=1).reshape(-1, 2, 2)))


def settle(path: Array, neighbours: Array) -> Array:
    """Step 4. ``neighbours`` ``[documents, k]``: the documents' own nearest, negative: missing."""
    for _ in range(PASSES):
        path, moved = _settle(path, neighbours)
        if not moved:
            break
    return path


def order(lists: Lists, vectors: Callable[[Array], Array]) -> Array:
    """All documents, int32 ``[documents]``."""
    with tempfile.TemporaryDirectory() as scratch:
        return settle(join_fragments(*match_documents(build_graph(lists)), vectors, Path(scratch)), lists.neighbours())


def _sums(path: Array, bounds: Array, vectors: Callable[[Array], Array], file: Path) -> Array:
    """The sum of each fragment's vectors, float32 ``[fragments, dims]``, in a file that is mapped."""
    first, sums = 0, np.zeros((0, 0))
    while first < len(bounds) - 1:
        last = max(first + 1, int(np.searchsorted(bounds, bounds[first] + ROWS, side="right")) - 1)
        rows = vectors(path[bounds[first] : bounds[last]]).astype(np.float32)
        if not first:
            sums = np.lib.format.open_memmap(file, "w+", np.float32, (len(bounds) - 1, rows.shape[1]))
        sums[first:last] = np.add.reduceat(rows, bounds[first:last] - bounds[first], axis=0)
        first = last
    return sums


def _hierarchy(sums: Array, scratch: Path) -> Array:
    """The order of the fragments with the given sums."""
    groups, bounds = np.arange(len(sums), dtype=np.int32), np.arange(len(sums) + 1)
    for level in itertools.count(1):
        if len(sums) == 1:
            break
        graph = build_graph(_near(sums, scratch / f"level-{level:02d}"))
        joined, ends = fragments(graph, FRAGMENT_LEVELS)
        if len(ends) - 1 == len(sums):  # nothing is like anything else: any order will do
            break
        sums = _sums(joined, ends, sums.__getitem__, scratch / f"sums-{level:02d}.npy")
        sizes = np.diff(bounds)[joined]
        members = np.repeat(bounds[:-1][joined] - np.cumsum(sizes) + sizes, sizes) + np.arange(len(groups))
        groups, bounds = groups[members], np.concatenate([[0], np.cumsum(sizes)])[ends]
    return groups


def _near(sums: Array, folder: Path) -> Lists:
    """The nearest of each fragment by mean vectors; of many through files."""
    k = min(NEAREST, len(sums) - 1)
    if len(sums) <= EXACT:
        return Lists([search(_unit(sums), k)])
    folder.mkdir()
    means = np.lib.format.open_memmap(folder / "means.npy", "w+", np.float32, sums.shape)
    for first in range(0, len(sums), ROWS):
        means[first : first + ROWS] = _unit(sums[first : first + ROWS])
    parts = [{"file": "means.npy", "documents": len(sums)}]
    shared = {"embedded": str(folder), "parts": parts, "k": k}
    found = join_cells(Stage("fragments", 1, folder, {}), shared, len(sums), serial_units)
    names = [neighbour_names(number) for number in range(sum("isolated" in result for result in found))]
    return Lists([(folder / ids, folder / similarities) for ids, similarities in names])


def _unit(sums: Array) -> Array:
    norms = np.linalg.norm(sums, axis=1, keepdims=True)
    return np.divide(sums, norms, out=np.zeros_like(sums), where=norms > 1e-6)


def _products(left: Array, right: Array, vectors: Callable[[Array], Array]) -> Array:
    """Similarity of each pair."""
    pieces = range(0, len(left), ROWS)
    parts = [np.einsum("nd,nd->n", vectors(left[i : i + ROWS]), vectors(right[i : i + ROWS])) for i in pieces]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)


@numba.njit(cache=True)
def _turns(gains: Array) -> Array:
    """Which fragments to reverse: the best sum of ``gains[i, reversed(i), reversed(i + 1)]`` (Viterbi)."""
    count = len(gains) + 1
    best, origin = np.zeros(2), np.zeros((count, 2), dtype=np.uint8)
    for i in range(1, count):
        score = np.empty(2)
        for turned in range(2):
            straight, reverse = best[0] + gains[i - 1, 0, turned], best[1] + gains[i - 1, 1, turned]
            origin[i, turned] = reverse > straight
            score[turned] = max(straight, reverse)
        best = score
    turns = np.zeros(count, dtype=np.uint8)
    turns[count - 1] = best[1] > best[0]
    for i in range(count - 1, 0, -1):
        turns[i - 1] = origin[i, turns[i]]
    return turns


@numba.njit(cache=True)
def _lay(path: Array, bounds: Array, order: Array, turns: Array) -> Array:
    laid, place = np.empty_like(path), 0
    for i in range(len(order)):
        first, last = bounds[order[i]], bounds[order[i] + 1]
        for j in range(last - first):
            laid[place] = path[last - 1 - j] if turns[i] else path[first + j]
            place += 1
    return laid


@numba.njit(cache=True)
def _settle(path: Array, neighbours: Array) -> tuple[Array, int]:
    """One pass: takes out the documents with none of their own nearest within REACH, and puts each beside one."""
    documents, k = neighbours.shape
    place = np.empty(documents, dtype=np.int32)
    for i in range(documents):
        place[path[i]] = i
    loose, moved = np.zeros(documents, dtype=np.bool_), 0
    for node in range(documents):
        known = near = False
        for column in range(k):
            target = neighbours[node, column]
            if target >= 0 and target != node:
                known = True
                near |= abs(place[target] - place[node]) <= REACH
        loose[node] = known and not near
        moved += loose[node]
    before, after = (
        place,
        np.full(documents + 1, -1, dtype=np.int32),
    )  # linked list; its head and tail are ``documents``
    last, count = documents, 0
    pending = np.empty(moved, dtype=np.int32)
    for node in path:
        if loose[node]:
            pending[count] = node
            count += 1
        else:
            after[last], before[node] = node, last
            last = np.int64(node)
    after[last] = documents
    while count:
        kept = 0
        for i in range(count):
            node = np.int64(pending[i])
            beside = _best_place(node, neighbours, loose, before, after)
            if beside < 0:
                pending[kept] = node
                kept += 1
                continue
            following = np.int64(after[beside])
            after[beside], before[node], after[node] = node, beside, following
            if following < documents:
                before[following] = node
            else:
                last = node
            loose[node] = False
        if kept == count:  # their nearest are all loose: they stay together, at the end
            break
        count = kept
    for i in range(count):
        node = np.int64(pending[i])
        after[last], after[node] = node, documents
        last = node
    result, node = np.empty(documents, dtype=np.int32), np.int64(after[documents])
    for i in range(documents):
        result[i] = node
        node = np.int64(after[node])
    return result, moved


@numba.njit(cache=True)
def _best_place(node: Int, neighbours: Array, loose: Array, before: Array, after: Array) -> Int:
    """The document (or the head) to follow: beside a near one, best between two of the nearest; -1: all are loose."""
    k = neighbours.shape[1]
    best, beside = -1, -1
    for column in range(k):
        target = np.int64(neighbours[node, column])
        if target < 0 or target == node or loose[target]:
            continue
        left, right, score_left, score_right = before[target], after[target], 0, 0
        for other in range(k):
            if neighbours[node, other] == left:
                score_left = k - other
            if neighbours[node, other] == right:
                score_right = k - other
        score = k - column + max(score_left, score_right)
        if score > best:
            best, beside = score, np.int64(target if score_right >= score_left else left)
    return beside
