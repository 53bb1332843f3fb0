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
    following, chains, starts = _chains(neighbours)
    return _merge(neighbours, following, chains, starts)


def chained(neighbours: Array) -> Array:
    """The order before merging: what the public ``sort`` gives, bit for bit."""
    following, _, starts = _chains(neighbours)
    return _write(following, starts, np.empty(0, dtype=np.int32))


@numba.njit(cache=True)
def _chains(neighbours: Array) -> tuple[Array, Array, Array]:
    """Each document's successor (-1) and chain, and each chain's first document."""
    documents, width = neighbours.shape[0], min(NEAREST, neighbours.shape[1])
    following, chain_of = np.full(documents, -1, dtype=np.int32), np.full(documents, -1, dtype=np.int32)
    starts = np.empty(documents, dtype=np.int32)
    chains, length, lowest, current = 0, 0, 0, -1
    for _ in range(documents):
        found = -1
        if current >= 0 and length < CHAIN:
            for column in range(width):
                target = neighbours[current, column]
                if 0 <= target < documents and chain_of[target] < 0:
                    found = target
                    break
        if found < 0:
            while chain_of[lowest] >= 0:
                lowest += 1
            found = lowest
            starts[chains] = found
            length = 0 if chains == 0 else 1
            chains += 1
        else:
            following[current] = found
            length += 1
        chain_of[found] = chains - 1
        current = found
    return following, chain_of, starts[:chains]


@numba.njit(cache=True)
def _merge(neighbours: Array, following: Array, chain_of: Array, starts: Array) -> Array:
    documents, width = neighbours.shape[0], min(NEAREST, neighbours.shape[1])
    before = np.full(documents, -1, dtype=np.int32)
    for node in range(documents):
        if following[node] >= 0:
            before[following[node]] = node
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
