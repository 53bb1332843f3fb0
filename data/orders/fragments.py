"""Fragments of a path, and joining them end to end: the kernel of ``data.orders.matching``.

In each level every fragment may be joined with one other: of the edges between ends of different fragments, those that
are the best of both their fragments are taken until none is left (a locally dominant matching, Preis 1999: what greedy
matching by weight gives, without sorting edges). Then what is joined counts as one and the next level begins. Fragments
grow evenly, so fewer are left over than where edges are taken greedily whatever the level, which strands documents.

Ties are broken by the lower and then by the higher number of the two ends, so the result depends on the edges alone:
not on the order of the lists, nor on how they are split into parts.
"""

import numba
import numpy as np

from data.orders.graph import Array, Graph, Int

NONE = -1
NOTHING = -(2**31)
LEVELS = 64  # at most; each takes a maximal matching, so about log2 of the longest path are used
STUCK = 16  # a round that joins fewer than one in so many fragments is the last: then joins are followed one by one


def match(graph: Graph, links: Array, ends: Array, levels: int = LEVELS) -> None:
    """Joins fragments in place, for some levels or until no edge joins the ends of two.

    ``links`` int32 ``[nodes, 2]``: neighbours in the path or -1; ``ends`` int32 ``[nodes]``: for an end of a fragment
    its other end (a lonely node's is itself), -1 inside. 11 bytes a node beside these.
    """
    _match(graph.pointers, graph.edges, graph.bits, links, ends, levels)


def lonely(nodes: int) -> tuple[Array, Array]:
    """Every node a fragment of its own: ``links`` and ``ends``."""
    return np.full((nodes, 2), NONE, dtype=np.int32), np.arange(nodes, dtype=np.int32)


def fragments(graph: Graph, levels: int) -> tuple[Array, Array]:
    """Matched fragments by their lower ends: nodes one fragment after another, and int64 ``[fragments + 1]`` bounds."""
    links, ends = lonely(len(graph))
    match(graph, links, ends, levels)
    starts = np.flatnonzero(ends >= np.arange(len(ends)))
    return traverse(links, starts)


@numba.njit(cache=True)
def _match(pointers: Array, edges: Array, bits: int, links: Array, ends: Array, levels: int) -> None:
    nodes = len(ends)
    cursor = np.zeros(nodes, dtype=np.uint16)  # edges at the head of a row that can never be taken again; saturates
    joined = np.zeros(nodes, dtype=np.uint8)  # level in which the fragment of an end was joined last
    # The edge that a fragment wants, at its lower end: from that end (or, with the sign bit, the higher) to the target.
    choice = np.empty(nodes, dtype=np.int32)
    pending = np.arange(nodes).astype(np.int32)
    for level in range(1, levels + 1):
        count = 0
        for node in range(nodes):
            if ends[node] >= node:
                choice[node] = _choose(node, level, pointers, edges, bits, ends, cursor, joined)
                if choice[node] != NOTHING:
                    pending[count] = node
                    count += 1
        if count == 0:
            return
        while count:
            for i in range(count):
                low = np.int64(pending[i])
                if joined[low] == level:
                    continue
                start, target = _wanted(low, choice, ends)
                if joined[target] == level:
                    continue
                other = min(target, np.int64(ends[target]))
                if choice[other] == NOTHING:
                    continue
                back, wanted = _wanted(other, choice, ends)
                if wanted == start and back == target:
                    joined[low] = joined[ends[low]] = joined[other] = joined[ends[other]] = level
                    _join(start, target, links, ends)
            left = 0
            for i in range(count):
                low = np.int64(pending[i])
                if joined[low] == level:
                    continue
                if joined[_wanted(low, choice, ends)[1]] == level:
                    choice[low] = _choose(low, level, pointers, edges, bits, ends, cursor, joined)
                if choice[low] != NOTHING:
                    pending[left] = low
                    left += 1
            if left > count - count // STUCK:
                _follow(pending[:left], level, pointers, edges, bits, ends, cursor, joined, choice, links)
                break
            count = left


@numba.njit(cache=True)
def _follow(
    pending: Array,
    level: int,
    pointers: Array,
    edges: Array,
    bits: int,
    ends: Array,
    cursor: Array,
    joined: Array,
    choice: Array,
    links: Array,
) -> None:
    """The rest of a level, from join to join: only fragments that wanted what has been joined choose again.

    Rounds would look at all of them for every link of a chain in which each edge waits for the one before, as among
    copies of one document, whose edges are all alike. Both ways join the same edges.
    """
    mask, count = np.uint32((1 << bits) - 1), len(pending)
    stack, waits = pending.copy(), np.zeros(len(ends), dtype=np.bool_)
    waits[pending] = True
    while count:
        count -= 1
        low = np.int64(stack[count])
        waits[low] = False
        if joined[low] == level or choice[low] == NOTHING:
            continue
        start, target = _wanted(low, choice, ends)
        other = min(target, np.int64(ends[target]))
        back, wanted = _wanted(other, choice, ends)
        if choice[other] == NOTHING or wanted != start or back != target:
            continue
        touched = (start, np.int64(ends[start]), target, np.int64(ends[target]))
        for end in touched:
            joined[end] = level
        _join(start, target, links, ends)
        for end in touched:
            for place in range(pointers[end], pointers[end + 1]):
                near = np.int64(edges[place] & mask)
                if ends[near] < 0 or joined[near] == level:
                    continue
                chooser = min(near, np.int64(ends[near]))
                if choice[chooser] == NOTHING or _wanted(chooser, choice, ends)[1] != end:
                    continue
                choice[chooser] = _choose(chooser, level, pointers, edges, bits, ends, cursor, joined)
                if not waits[chooser]:
                    waits[chooser] = True
                    stack[count] = chooser
                    count += 1


@numba.njit(cache=True)
def _wanted(low: Int, choice: Array, ends: Array) -> tuple[Int, Int]:
    """Both documents of the edge that a fragment wants."""
    code = np.int64(choice[low])
    return (low, code) if code >= 0 else (np.int64(ends[low]), -1 - code)


@numba.njit(cache=True)
def _choose(
    low: Int, level: int, pointers: Array, edges: Array, bits: int, ends: Array, cursor: Array, joined: Array
) -> Int:
    """The best edge of either end to an end of a fragment that this level has not joined; NOTHING if there is none."""
    mask = np.uint32((1 << bits) - 1)
    best, best_low, best_high, code = np.int64(1) << 40, 0, 0, NOTHING
    high = np.int64(ends[low])
    for side in range(2 if high != low else 1):
        end, far = (high, low) if side else (low, high)
        prefix = True
        for place in range(pointers[end] + cursor[end], pointers[end + 1]):
            neighbour = np.int64(edges[place] & mask)
            if ends[neighbour] < 0 or neighbour == far:
                if prefix and cursor[end] < 65535:
                    cursor[end] += 1
                continue
            prefix = False
            if joined[neighbour] == level:
                continue
            weight = np.int64(edges[place] >> np.uint32(bits))
            a, b = min(end, neighbour), max(end, neighbour)
            if weight < best or (weight == best and (a < best_low or (a == best_low and b < best_high))):
                best, best_low, best_high = weight, a, b
                code = -1 - neighbour if side else neighbour
            break
    return code


@numba.njit(cache=True)
def _join(start: Int, target: Int, links: Array, ends: Array) -> None:
    """Joins two fragments at an end of each."""
    far, beyond = np.int64(ends[start]), np.int64(ends[target])
    links[start, 0 if links[start, 0] < 0 else 1] = target
    links[target, 0 if links[target, 0] < 0 else 1] = start
    ends[start] = ends[target] = NONE
    ends[far], ends[beyond] = beyond, far


@numba.njit(cache=True)
def traverse(links: Array, starts: Array) -> tuple[Array, Array]:
    """The fragments that start at ``starts``: nodes one fragment after another, and the bounds."""
    path, bounds = np.empty(len(links), dtype=np.int32), np.zeros(len(starts) + 1, dtype=np.int64)
    place = 0
    for fragment in range(len(starts)):
        before, node = np.int64(NONE), np.int64(starts[fragment])
        while node >= 0:
            path[place] = node
            place += 1
            following = links[node, 0] if links[node, 0] != before else links[node, 1]
            before, node = node, np.int64(following)
        bounds[fragment + 1] = place
    return path[:place], bounds
