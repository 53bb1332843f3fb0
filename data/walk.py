"""The document walk of In-Context Pretraining (Shi et al. 2023, arXiv 2310.10638, Algorithm 1).

Documents are the nodes of an undirected graph; an edge joins two of which one is among the other's k nearest, weighted
by their similarity. The walk starts at the unvisited node with the fewest unvisited neighbours, goes on to the most
similar unvisited neighbour until there is none, and starts again. So every document is visited once.

The paper leaves ties open and prints an argmin for the step, where its text and figure say the most similar. Here: the
step takes the highest similarity, then the lowest id; the start takes, of the nodes with equally few unvisited
neighbours, the one whose number fell last (a stack for each number), at first the lowest id. The stack makes jumps
local. Time O(documents + edges).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Graph:
    """Undirected graph in CSR form; each node's neighbours by similarity descending, then id ascending."""

    pointers: Ints  # [nodes + 1]
    targets: Ints  # [2 * edges]

    def __len__(self) -> int:
        return len(self.pointers) - 1


def build_graph(neighbours: npt.NDArray[np.integer], similarities: npt.NDArray[np.floating]) -> Graph:
    """The undirected graph of ``[documents, k]`` neighbour lists.

    Missing neighbours (negative) and a document's own id are left out; where two lists give an edge different
    similarities the larger counts.
    """
    documents, k = neighbours.shape
    source = np.repeat(np.arange(documents, dtype=np.int64), k)
    target = neighbours.reshape(-1).astype(np.int64)
    weight = similarities.reshape(-1).astype(np.float64)
    real = (target >= 0) & (target != source)
    source, target, weight = source[real], target[real], weight[real]
    left, right = np.concatenate([source, target]), np.concatenate([target, source])
    weight = np.concatenate([weight, weight])
    order = np.lexsort((-weight, right, left))
    left, right, weight = left[order], right[order], weight[order]
    first = np.ones(left.size, dtype=bool)
    first[1:] = (left[1:] != left[:-1]) | (right[1:] != right[:-1])
    left, right, weight = left[first], right[first], weight[first]
    order = np.lexsort((right, -weight, left))
    return Graph(np.searchsorted(left, np.arange(documents + 1)), right[order])


def walk(graph: Graph) -> Ints:
    """Algorithm 1: all nodes in the order of the walk, int64 ``[nodes]``."""
    nodes = len(graph)
    pointers, targets = graph.pointers.tolist(), graph.targets.tolist()
    degree: list[int] = np.diff(graph.pointers).tolist()
    stacks = _stacks(degree)
    visited = bytearray(nodes)
    path: list[int] = []
    lowest = 0
    while True:
        lowest, start = _pop(stacks, lowest, degree, visited)
        if start is None:
            return np.array(path, dtype=np.int64)
        current: int | None = start
        while current is not None:
            visited[current] = 1
            path.append(current)
            following = None
            for neighbour in targets[pointers[current] : pointers[current + 1]]:
                if not visited[neighbour]:
                    if following is None:
                        following = neighbour
                    left = degree[neighbour] = degree[neighbour] - 1
                    stacks[left].append(neighbour)
                    if left < lowest:
                        lowest = left
            current = following


def _stacks(degree: Sequence[int]) -> list[list[int]]:
    """One stack for each number of unvisited neighbours, the lowest id on top."""
    stacks: list[list[int]] = [[] for _ in range(max(degree, default=0) + 1)]
    for node in reversed(range(len(degree))):
        stacks[degree[node]].append(node)
    return stacks


def _pop(stacks: list[list[int]], lowest: int, degree: list[int], visited: bytearray) -> tuple[int, int | None]:
    """The unvisited node with the fewest unvisited neighbours; entries that are out of date are dropped on the way."""
    while lowest < len(stacks):
        stack = stacks[lowest]
        while stack:
            node = stack.pop()
            if not visited[node] and degree[node] == lowest:
                return lowest, node
        lowest += 1
    return lowest, None
