"""The neighbour graph of the documents: undirected, weighted, four bytes for each end of an edge.

Two documents are joined if one is among the other's k nearest; the larger of the two similarities counts. An edge is
packed into 32 bits: the similarity's distance from 1 in steps of 2 / levels above, the neighbour's number below, so
that ascending integers are descending similarities with ties by number. A million documents leave 12 bits, 4,096
levels; rounding also makes the order independent of the last bits of a floating-point sum.

The lists are read block of targets by block of targets, so that the edges that arrive at a document are only ever held
for an eighth of the documents. Peak memory is that of the finished graph and about 15 bytes a document.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

BLOCKS = 8  # of targets; each costs one pass over the lists
MAX_DOCUMENTS = 2**24  # of one graph: at least 8 bits are left for the similarity
SEEN = 1024  # slots of the filter for repeated neighbours
ROW = 96  # entries of a row that are sorted in place; longer rows (hubs) go through a sort
Array = npt.NDArray[Any]
Int = Any  # an integer of any width inside compiled code


@dataclass(frozen=True)
class Lists:
    """Neighbour lists: parts of int ids ``[documents, k]`` (negative: missing) and float similarities of that shape.

    A part is a pair of arrays or of .npy files; files are mapped one part at a time.
    """

    parts: Sequence[tuple[Array, Array] | tuple[Path, Path]]

    def __iter__(self) -> Iterator[tuple[Array, Array]]:
        for ids, similarities in self.parts:
            if isinstance(ids, Path):
                yield np.load(ids, mmap_mode="r"), np.load(Path(str(similarities)), mmap_mode="r")
            else:
                yield ids, np.asarray(similarities)

    def __len__(self) -> int:
        return sum(len(ids) for ids, _ in self)

    def neighbours(self, k: int | None = None) -> Array:
        """The ids in memory, int32 ``[documents, k]``; the nearest ``k`` of them, or all."""
        parts = [np.asarray(ids[:, :k], dtype=np.int32) for ids, _ in self]
        return np.concatenate(parts) if parts else np.zeros((0, 1), dtype=np.int32)


@dataclass(frozen=True)
class Graph:
    """CSR; the edges of document ``d`` are ``edges[pointers[d]:pointers[d + 1]]``, the most similar first."""

    pointers: Array  # int64 [documents + 1]
    edges: Array  # uint32 [ends], (levels - 1 - level) << bits | neighbour
    bits: int  # of a document number

    def __len__(self) -> int:
        return len(self.pointers) - 1

    @property
    def mask(self) -> np.uint32:
        """Of the neighbour's number in an edge."""
        return np.uint32((1 << self.bits) - 1)

    def similarities(self) -> Array:
        """Similarity of every edge, float32 ``[ends]``, rounded to the graph's levels."""
        levels = 2 ** (32 - self.bits)
        return (1 - 2 * (self.edges >> np.uint32(self.bits)) / (levels - 1)).astype(np.float32)


def build_graph(lists: Lists) -> Graph:
    """The undirected graph. Missing, out-of-range and repeated neighbours, self loops and NaNs are left out."""
    documents = len(lists)
    if documents > MAX_DOCUMENTS:
        raise ValueError(f"{documents} documents in one graph; more than {MAX_DOCUMENTS} need order.partitions")
    bits = max(1, (documents - 1).bit_length()) if documents else 1
    arriving, leaving = np.zeros(documents, dtype=np.int32), 0
    for ids, similarities in lists:
        leaving += _count(ids, similarities, arriving)
    edges = np.empty(leaving + int(arriving.sum(dtype=np.int64)), dtype=np.uint32)  # an upper bound; touched as used
    pointers = np.zeros(documents + 1, dtype=np.int32 if edges.size < 2**31 else np.int64)
    size = max(1, -(-documents // BLOCKS))
    for first in range(0, documents, size):
        last, start = min(first + size, documents), 0
        starts = np.concatenate([[0], np.cumsum(arriving[first:last], dtype=np.int64)])
        sources, ends = np.empty(int(starts[-1]), dtype=np.uint32), starts[:-1].copy()
        for ids, similarities in lists:
            _arrive(ids, similarities, start, first, bits, sources, ends)
            start += len(ids)
        start = 0
        for ids, similarities in lists:
            if start < last and start + len(ids) > first:
                _merge(ids, similarities, start, first, bits, sources, starts, pointers, edges)
            start += len(ids)
    return Graph(pointers, edges[: pointers[-1]], bits)


@numba.njit(cache=True)
def _pack(similarity: float, target: int, bits: int) -> np.uint32:
    levels = 1 << (32 - bits)
    level = int((1.0 - min(1.0, max(-1.0, similarity))) * 0.5 * (levels - 1) + 0.5)
    return np.uint32((level << bits) | target)


@numba.njit(cache=True)
def _count(ids: Array, similarities: Array, arriving: Array) -> int:
    """Counts the entries that may become edges, by target."""
    total, documents = 0, len(arriving)
    for row in range(ids.shape[0]):
        for column in range(ids.shape[1]):
            target = ids[row, column]
            if 0 <= target < documents and similarities[row, column] == similarities[row, column]:
                arriving[target] += 1
                total += 1
    return total


@numba.njit(cache=True)
def _arrive(ids: Array, similarities: Array, start: int, first: int, bits: int, sources: Array, ends: Array) -> None:
    """Collects the edges that arrive at ``first + range(len(ends))``, by target."""
    size = len(ends)
    for row in range(ids.shape[0]):
        for column in range(ids.shape[1]):
            target = ids[row, column] - first
            if 0 <= target < size and similarities[row, column] == similarities[row, column]:
                sources[ends[target]] = _pack(similarities[row, column], start + row, bits)
                ends[target] += 1


@numba.njit(cache=True)
def _merge(
    ids: Array,
    similarities: Array,
    start: int,
    first: int,
    bits: int,
    sources: Array,
    starts: Array,
    pointers: Array,
    edges: Array,
) -> None:
    """Writes the rows of those documents of one part that lie in the block: leaving and arriving edges, once each."""
    documents, k = len(pointers) - 1, ids.shape[1]
    mask = np.uint32((1 << bits) - 1)
    small, seen = np.empty(ROW, dtype=np.uint32), np.full(SEEN, -1, dtype=np.int64)
    for node in range(max(start, first), min(start + ids.shape[0], first + len(starts) - 1)):
        low, high = starts[node - first], starts[node - first + 1]
        row = small if k + high - low <= ROW else np.empty(k + high - low, dtype=np.uint32)
        size = 0
        for column in range(k):
            target, similarity = ids[node - start, column], similarities[node - start, column]
            if 0 <= target < documents and target != node and similarity == similarity:
                row[size] = _pack(similarity, target, bits)
                size += 1
        for place in range(low, high):
            if np.int64(sources[place] & mask) != node:
                row[size] = sources[place]
                size += 1
        size = _unique_small(row, size, mask, node, seen) if len(row) <= ROW else _unique_large(row, size, bits)
        place = np.int64(pointers[node])
        for i in range(size):
            edges[place + i] = row[i]
        pointers[node + 1] = place + size


@numba.njit(cache=True)
def _unique_small(row: Array, size: int, mask: np.uint32, node: int, seen: Array) -> int:
    """Sorts ``row[:size]`` by insertion and keeps a neighbour's best entry; returns what is left.

    ``seen`` holds, by number modulo its size, the last row that such a neighbour was met in.
    """
    kept = 0
    for i in range(size):
        entry = row[i]
        number = np.int64(entry & mask)
        hole = kept
        if seen[number % SEEN] == node:  # perhaps a neighbour that the row has: look
            hole = 0
            while hole < kept and np.int64(row[hole] & mask) != number:
                hole += 1
            if hole < kept and row[hole] <= entry:
                continue
        seen[number % SEEN] = node
        kept = max(kept, hole + 1)
        while hole > 0 and row[hole - 1] > entry:
            row[hole] = row[hole - 1]
            hole -= 1
        row[hole] = entry
    return kept


@numba.njit(cache=True)
def _unique_large(row: Array, size: int, bits: int) -> int:
    """As ``_unique_small``, in O(size log size)."""
    mask = np.uint64((1 << bits) - 1)
    keys = np.empty(size, dtype=np.uint64)
    for i in range(size):
        keys[i] = (np.uint64(row[i]) & mask) << np.uint64(32) | np.uint64(row[i])
    keys.sort()
    kept = 0
    for i in range(size):
        if i == 0 or keys[i] >> np.uint64(32) != keys[i - 1] >> np.uint64(32):
            row[kept] = np.uint32(keys[i] & np.uint64(0xFFFFFFFF))
            kept += 1
    row[:kept] = np.sort(row[:kept])
    return kept
