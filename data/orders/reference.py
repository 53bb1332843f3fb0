"""The order that the public code of In-Context Pretraining computes: the baseline of comparisons.

Not Algorithm 1. Chains: from a document to the first of its nine nearest that no chain has, until there is none or the
chain has 21 documents (the first chain 22, an off-by-one that is kept); the next chain starts at the lowest document
left. Merging: chains of fewer than 21 are dissolved in turn, each of their documents goes before the first of its nine
nearest that lies in another chain. Chains are written one after another.

Where the public code fails (a document whose nine nearest lie in its own chain or in none, missing neighbours, the
unregistered first document) the intention is kept: such documents come last. Its insertion into Python lists is
quadratic on hubs; here chains are linked lists, with the same result.
"""

import numba
import numpy as np

from data.orders.graph import Array, Lists

NEAREST = 9  # neighbours that are looked at, whatever k is
CHAIN = 21  # documents in a chain; fewer are dissolved


def order(lists: Lists) -> Array:
    """All documents, int32 ``[documents]``."""
    return reference(lists.neighbours(NEAREST))


def reference(neighbours: Array) -> Array:
    """The order int32 ``[documents]`` from neighbour lists ``[documents, k]``, nearest first, negative: missing."""
    nearest = _nearest(neighbours)
    return _merge(nearest, *_chains(nearest))


def chained(neighbours: Array) -> Array:
    """The order before merging: what the public ``sort`` gives, bit for bit."""
    return _chains(_nearest(neighbours))[0]


def _nearest(neighbours: Array) -> Array:
    """The columns that are looked at: a step reads a row anywhere, and caches hold more of short rows."""
    return np.ascontiguousarray(neighbours[:, :NEAREST], dtype=np.int32)


@numba.njit(cache=True)
def _chains(neighbours: Array) -> tuple[Array, Array]:
    """The chains one after another, int32 ``[documents]``, and where each begins, with the end."""
    documents, width = neighbours.shape
    path, bounds = np.empty(documents, dtype=np.int32), np.empty(documents + 1, dtype=np.int32)
    taken = np.zeros(documents, dtype=np.bool_)  # small: it stays in a core's cache, as lists cannot
    chains, length, lowest = 0, CHAIN, 0
    for place in range(documents):
        found = -1
        if length < CHAIN:
            current = path[place - 1]
            for column in range(width):
                target = neighbours[current, column]
                if 0 <= target < documents and not taken[target]:
                    found = target
                    break
        length += 1
        if found < 0:
            while taken[lowest]:
                lowest += 1
            found = lowest
            bounds[chains] = place
            length = 0 if chains == 0 else 1
            chains += 1
        taken[found] = True
        path[place] = found
    bounds[chains] = documents
    return path, bounds[: chains + 1]


@numba.njit(cache=True)
def _merge(neighbours: Array, path: Array, bounds: Array) -> Array:
    documents, width = neighbours.shape
    following, before = np.full(documents, -1, dtype=np.int32), np.full(documents, -1, dtype=np.int32)
    chain_of, starts = np.empty(documents, dtype=np.int32), np.empty(len(bounds) - 1, dtype=np.int32)
    for chain in range(len(starts)):
        starts[chain] = path[bounds[chain]]
        for place in range(bounds[chain], bounds[chain + 1]):
            chain_of[path[place]] = chain
            if place > bounds[chain]:
                following[path[place - 1]], before[path[place]] = path[place], path[place - 1]
    last, left = np.empty(documents, dtype=np.int32), 0
    members = np.empty(documents, dtype=np.int32)
    for chain in range(len(starts)):
        size, node = 0, np.int64(starts[chain])
        while node >= 0:
            members[size] = node
            size += 1
            node = np.int64(following[node])
        if size >= CHAIN:
            continue
        starts[chain] = -1
        for i in range(size):
            node = np.int64(members[i])
            found = -1
            for column in range(width):
                target = neighbours[node, column]
                if 0 <= target < documents and chain_of[target] >= 0 and chain_of[target] != chain:
                    found = target
                    break
            if found < 0:
                chain_of[node], following[node] = -1, -1
                last[left] = node
                left += 1
                continue
            chain_of[node], following[node], before[node] = chain_of[found], found, before[found]
            if before[found] >= 0:
                following[before[found]] = node
            else:
                starts[chain_of[found]] = node
            before[found] = node
    return _write(following, starts, last[:left])


@numba.njit(cache=True)
def _write(following: Array, starts: Array, last: Array) -> Array:
    path, place = np.empty(len(following), dtype=np.int32), 0
    for start in starts:
        node = np.int64(start)
        while node >= 0:
            path[place] = node
            place += 1
            node = np.int64(following[node])
    path[place:] = last
    return path
