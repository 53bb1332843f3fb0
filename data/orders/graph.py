"""The neighbour graph of the documents: undirected, weighted, four bytes for each end of an edge.

Two documents are joined if one is among the other's k nearest; the larger of the two similarities counts. An edge is
packed into 32 bits: the similarity's distance from 1 in steps of 2 / levels above, the neighbour's number below, so
that ascending integers are descending similarities with ties by number. A million documents leave 12 bits, 4,096
levels; rounding also makes the order independent of the last bits of a floating-point sum.

Edges reach the documents they arrive at in two steps that stay inside caches: one pass over the lists writes them by
blocks of targets, and each block is then spread over its own documents. What a block was made from is given back before
the next, so peak memory is that of the finished graph and about 15 bytes a document.
"""

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

SHIFT = 15  # 2 ** 15 documents are one block of targets: their edges fit in a core's cache
MAX_DOCUMENTS = 2**24  # of one graph: at least 8 bits are left for the similarity
ROW = 128  # entries of a row that are ranked by comparing all with all; longer rows (hubs) are sorted
SEEN = 1024  # slots of the filter for repeated neighbours
LANES = 32  # rows are filled up to a multiple, so that compiled loops need no remainder
NOTHING = np.uint32(0xFFFFFFFF)  # what rows are filled up with
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

    def neighbours(self, k: int | None = None, file: Path | None = None) -> Array:
        """The ids of the nearest ``k`` (or all), int32 ``[documents, k]``, in memory or in a new ``file``, mapped."""
        shape = len(self), next((ids[:, :k].shape[1] for ids, _ in self), 1)
        # a map of nothing is an error
        rows = (
            np.lib.format.open_memmap(file, "w+", np.int32, shape) if file and shape[0] else np.empty(shape, np.int32)
        )
        start = 0
        for ids, _ in self:
            rows[start : start + len(ids)] = ids[:, :k]
            start += len(ids)
        return rows


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
    arriving, total = np.zeros(documents, dtype=np.int32), 0
    for ids, similarities in lists:
        total += _count(ids, similarities, arriving)
    firsts = range(0, documents, 1 << SHIFT)
    bounds = np.cumsum([0, *(int(arriving[first : first + (1 << SHIFT)].sum()) for first in firsts)])
    packed, targets = _anonymous(total, np.uint32), _anonymous(total, np.uint16)
    start, ends = 0, bounds[:-1].copy()
    for ids, similarities in lists:
        _by_block(ids, similarities, start, documents, bits, packed[1], targets[1], ends)
        start += len(ids)
    edges = np.empty(2 * total, dtype=np.uint32)  # an upper bound; touched as used
    pointers = np.zeros(documents + 1, dtype=np.int32 if edges.size < 2**31 else np.int64)
    for block, first in enumerate(firsts):
        last, (low, high) = min(first + (1 << SHIFT), documents), bounds[block : block + 2].tolist()
        starts = np.concatenate([[0], np.cumsum(arriving[first:last], dtype=np.int64)])
        sources = _spread(packed[1][low:high], targets[1][low:high], starts[:-1].astype(np.int32))
        for memory, numbers in (packed, targets):
            _give_back(memory, low * numbers.itemsize, high * numbers.itemsize)
        start = 0
        for ids, similarities in lists:
            if start < last and start + len(ids) > first:
                _merge(ids, similarities, start, first, bits, sources, starts, pointers, edges)
            start += len(ids)
    return Graph(pointers, edges[: pointers[-1]], bits)


def _anonymous(size: int, dtype: Any) -> tuple[mmap.mmap, Array]:
    """Memory that can be given back piece by piece, and an array in it."""
    memory = mmap.mmap(-1, max(1, size) * np.dtype(dtype).itemsize)
    return memory, np.frombuffer(memory, dtype=dtype, count=size)


def _give_back(memory: mmap.mmap, first: int, last: int) -> None:
    """Frees the pages up to the one with byte ``last``, from the one with byte ``first`` on."""
    first, last = first // mmap.PAGESIZE * mmap.PAGESIZE, last // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        memory.madvise(mmap.MADV_DONTNEED, first, last - first)


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
def _by_block(
    ids: Array,
    similarities: Array,
    start: int,
    documents: int,
    bits: int,
    packed: Array,
    targets: Array,
    ends: Array,
) -> None:
    """Writes one part's edges, and their targets' places in their blocks, to where the blocks end."""
    for row in range(ids.shape[0]):
        for column in range(ids.shape[1]):
            target, similarity = np.int64(ids[row, column]), similarities[row, column]
            if 0 <= target < documents and similarity == similarity:
                end = ends[target >> SHIFT]
                packed[end] = _pack(similarity, start + row, bits)
                targets[end] = target & ((1 << SHIFT) - 1)
                ends[target >> SHIFT] = end + 1


@numba.njit(cache=True)
def _spread(packed: Array, targets: Array, ends: Array) -> Array:
    """A block's edges by target, in the order they have."""
    sources = np.empty(len(packed), dtype=np.uint32)
    for i in range(len(packed)):
        target = targets[i]
        sources[ends[target]] = packed[i]
        ends[target] += 1
    return sources


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
    small, numbers, counts = np.empty(ROW, np.uint32), np.empty(ROW, np.uint32), np.empty(ROW, np.int32)
    seen = np.full(SEEN, -1, dtype=np.int32)
    for node in range(max(start, first), min(start + ids.shape[0], first + len(starts) - 1)):
        low, high = starts[node - first], starts[node - first + 1]
        short = k + high - low <= ROW
        row = small if short else np.empty(k + high - low, dtype=np.uint32)
        size, kept = 0, 0
        for column in range(k):
            target, similarity = ids[node - start, column], similarities[node - start, column]
            if 0 <= target < documents and target != node and similarity == similarity:
                row[size] = _pack(similarity, target, bits)
                size += 1
        if short and _all_differ(row, size, mask, numbers, seen, node):
            kept = _join(row, size, sources, low, high, node, mask, numbers)
        if kept:
            _ranked(row, kept, counts, edges, pointers[node])
        else:
            for place in range(low, high):
                if np.int64(sources[place] & mask) != node:
                    row[size] = sources[place]
                    size += 1
            kept = _unique(row, size, bits)
            edges[pointers[node] : pointers[node] + kept] = row[:kept]
        pointers[node + 1] = pointers[node] + kept


@numba.njit(cache=True)
def _filled(size: int) -> int:
    return (size + LANES - 1) // LANES * LANES


@numba.njit(cache=True)
def _all_differ(row: Array, size: int, mask: np.uint32, numbers: Array, seen: Array, node: int) -> bool:
    """Whether no neighbour is in the row twice; leaves the row's numbers in ``numbers``.

    ``seen`` holds, by number modulo its size, the last node whose row had such a number.
    """
    numbers[: _filled(size)] = NOTHING
    differ = True
    for i in range(size):
        number = row[i] & mask
        slot = np.int64(number) % SEEN
        if seen[slot] == node:  # perhaps a neighbour that the row has: look
            for j in range(i):
                differ &= numbers[j] != number
        numbers[i], seen[slot] = number, node
    return differ


@numba.njit(cache=True)
def _join(
    row: Array, size: int, sources: Array, low: int, high: int, node: int, mask: np.uint32, numbers: Array
) -> int:
    """Adds what arrives to the row, the better one where it is there already.

    Returns how many there are; 0 for none, and where one source arrives twice.
    """
    filled, leaving, before = _filled(size), size, NOTHING
    for place in range(low, high):
        number = sources[place] & mask
        if number == before:
            return 0
        before = number
        if np.int64(number) == node:
            continue
        found = False
        for i in range(filled):
            found |= numbers[i] == number
        if found:
            for i in range(leaving):
                if numbers[i] == number:
                    row[i] = min(row[i], sources[place])
        else:
            row[size] = sources[place]
            size += 1
    return size


@numba.njit(cache=True)
def _ranked(row: Array, size: int, counts: Array, edges: Array, first: int) -> None:
    """Writes different entries to ``edges[first:]`` in ascending order."""
    filled = _filled(size)
    row[size:filled] = NOTHING
    counts[:filled] = 0
    for j in range(size):
        for i in range(filled):
            counts[i] += row[i] > row[j]
    for i in range(size):
        edges[first + counts[i]] = row[i]


@numba.njit(cache=True)
def _unique(row: Array, size: int, bits: int) -> int:
    """Sorts ``row[:size]`` and keeps a neighbour's best entry; returns how many are left."""
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
