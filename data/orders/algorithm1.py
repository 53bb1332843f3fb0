"""The document walk of In-Context Pretraining (Shi et al. 2023, arXiv 2310.10638, Algorithm 1).

The walk starts at the unvisited document with the fewest unvisited neighbours, goes on to the most similar unvisited
neighbour until there is none, and starts again: every document once.

The paper leaves ties open and prints an argmin for the step, where its text and figure say the most similar. Here the
step takes the highest similarity, then the lowest number; the start takes, of the documents with equally few unvisited
neighbours, the one whose number fell last (a stack for each number), at first the lowest. The stack makes jumps local.
Time O(documents + edges), 12 bytes a document beside the graph: the path is a chain through what visited documents no
longer need, and is laid out when the graph is gone.
"""

import numba
import numpy as np

from data.orders.graph import Array, Graph, Int, Lists, build_graph

DEGREE, ABOVE, BELOW = 0, 1, 2  # of a document: unvisited neighbours, and its place in the stack of its degree
VISITED, NEXT, PREVIOUS = -1, ABOVE, BELOW  # of a visited document: its degree, where those beside it are kept


def order(lists: Lists) -> Array:
    """All documents, int32 ``[documents]``."""
    graph = build_graph(lists)
    chain = _walk(graph.pointers, graph.edges, graph.mask)
    del graph
    return _lay_out(*chain)


def walk(graph: Graph) -> Array:
    """All documents in the order of the walk, int32 ``[documents]``."""
    return _lay_out(*_walk(graph.pointers, graph.edges, graph.mask))


@numba.njit(cache=True)
def _walk(pointers: Array, edges: Array, mask: np.uint32) -> tuple[Int, Int, Array]:
    """The first and the last document, and the states, in which NEXT and PREVIOUS are the documents beside each."""
    nodes = len(pointers) - 1
    state = np.empty((nodes, 3), dtype=np.int32)  # DEGREE, ABOVE, BELOW side by side: one cache line a document
    most = 0
    for node in range(nodes):
        state[node, DEGREE] = pointers[node + 1] - pointers[node]
        most = max(most, state[node, DEGREE])
    top = np.full(most + 1, -1, dtype=np.int32)  # of the stack of each degree
    for node in range(nodes - 1, -1, -1):
        _push(node, state[node, DEGREE], top, state)
    unvisited = np.empty(most, dtype=np.int32)
    lowest, visited, first, last = 0, 0, np.int64(-1), np.int64(-1)
    while visited < nodes:
        while top[lowest] < 0:
            lowest += 1
        current = np.int64(top[lowest])
        while current >= 0:
            _unlink(current, state[current, DEGREE], top, state)
            state[current, DEGREE], state[current, PREVIOUS] = VISITED, last
            if last >= 0:
                state[last, NEXT] = current
            else:
                first = current
            last = current
            visited += 1
            count = 0
            for edge in range(pointers[current], pointers[current + 1]):  # independent loads: misses overlap
                neighbour = np.int64(edges[edge] & mask)
                unvisited[count] = neighbour
                count += state[neighbour, DEGREE] >= 0
            for i in range(count):
                neighbour = np.int64(unvisited[i])
                left = state[neighbour, DEGREE] - 1
                _unlink(neighbour, left + 1, top, state)
                state[neighbour, DEGREE] = left
                _push(neighbour, left, top, state)
                lowest = min(lowest, left)
            current = np.int64(unvisited[0]) if count else np.int64(-1)
    return first, last, state


@numba.njit(cache=True)
def _lay_out(first: Int, last: Int, state: Array) -> Array:
    """The chain as an array, from both ends at once: two reads are on their way at a time."""
    nodes = len(state)
    path, front, back = np.empty(nodes, dtype=np.int32), np.int64(first), np.int64(last)
    for place in range((nodes + 1) // 2):
        path[place], path[nodes - 1 - place] = front, back
        front, back = np.int64(state[front, NEXT]), np.int64(state[back, PREVIOUS])
    return path


@numba.njit(cache=True)
def _push(node: Int, degree: int, top: Array, state: Array) -> None:
    under = top[degree]
    state[node, ABOVE], state[node, BELOW] = -1, under
    if under >= 0:
        state[under, ABOVE] = node
    top[degree] = node


@numba.njit(cache=True)
def _unlink(node: Int, degree: int, top: Array, state: Array) -> None:
    over, under = state[node, ABOVE], state[node, BELOW]
    if over >= 0:
        state[over, BELOW] = under
    else:
        top[degree] = under
    if under >= 0:
        state[under, ABOVE] = over
