"""The walk against a slow reading of Algorithm 1, on graphs of every shape."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.metrics import adjacent_similarity, jumps, random_order
from data.walk import build_graph, walk


def oracle(neighbours: list[list[int]], similarities: list[list[float]]) -> list[int]:
    """Algorithm 1, one step after another, in quadratic time."""
    n = len(neighbours)
    edges: list[dict[int, float]] = [{} for _ in range(n)]
    for i in range(n):
        for j, s in zip(neighbours[i], similarities[i], strict=True):
            if 0 <= j != i:
                edges[i][j] = edges[j][i] = max(s, edges[i].get(j, -np.inf))
    unvisited = set(range(n))
    changed = {i: -i for i in range(n)}  # when its degree fell last; at first lower ids are later
    clock, path = 0, []

    def visit(node: int) -> list[int]:
        nonlocal clock
        path.append(node)
        unvisited.remove(node)
        left = sorted(unvisited & edges[node].keys(), key=lambda x: (-edges[node][x], x))
        for other in left:
            clock += 1
            changed[other] = clock
        return left

    while unvisited:
        left = visit(min(unvisited, key=lambda x: (len(unvisited & edges[x].keys()), -changed[x])))
        while left:
            left = visit(left[0])
    return path


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[list[int]], list[list[float]]]:
    """Neighbour lists of 1..50 documents with missing ids, self loops, repeated ids, hubs and ties."""
    n, k = draw(st.integers(1, 50)), draw(st.integers(1, 6))
    hub = draw(st.integers(0, n - 1))
    ids = st.one_of(st.integers(-1, n - 1), st.just(hub))
    weights = st.sampled_from([0.0, 0.25, 0.5, 0.5, 0.75, 1.0, -0.1])
    rows = st.lists(ids, min_size=k, max_size=k), st.lists(weights, min_size=k, max_size=k)
    return draw(st.lists(rows[0], min_size=n, max_size=n)), draw(st.lists(rows[1], min_size=n, max_size=n))


@settings(max_examples=150, deadline=None)
@given(graphs())
def test_walk_equals_the_oracle_and_is_a_permutation(graph: tuple[list[list[int]], list[list[float]]]) -> None:
    path = walk(build_graph(np.array(graph[0]), np.array(graph[1], dtype=np.float32))).tolist()
    assert sorted(path) == list(range(len(graph[0])))
    assert path == oracle(*graph)


def test_no_documents_and_no_edges() -> None:
    assert walk(build_graph(np.zeros((0, 3), dtype=np.int64), np.zeros((0, 3)))).tolist() == []
    assert walk(build_graph(np.full((4, 2), -1), np.zeros((4, 2)))).tolist() == [0, 1, 2, 3]


def test_path_of_a_small_graph() -> None:
    # A triangle 0-1-2 with a tail 2-3 and a lonely node 4: the lonely one first, then in from the tail's end.
    neighbours = np.array([[1, 2], [0, 2], [3, 0], [2, -1], [-1, -1]])
    similarities = np.array([[0.9, 0.2], [0.9, 0.3], [0.5, 0.2], [0.5, 0.0], [0.0, 0.0]])
    assert walk(build_graph(neighbours, similarities)).tolist() == [4, 3, 2, 1, 0]


def test_walk_does_not_depend_on_the_order_inside_lists() -> None:
    rng = np.random.default_rng(3)
    neighbours = rng.integers(0, 200, (200, 5))
    similarities = rng.random((200, 5)).astype(np.float32)
    mixed = rng.permuted(np.arange(5)[None].repeat(200, 0), axis=1)
    rows = np.arange(200)[:, None]
    one, two = build_graph(neighbours, similarities), build_graph(neighbours[rows, mixed], similarities[rows, mixed])
    assert np.array_equal(walk(one), walk(two))


def test_metrics_against_direct_sums() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(30, 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    order = rng.permutation(30)
    direct = np.mean([vectors[a] @ vectors[b] for a, b in itertools.pairwise(order)])
    assert adjacent_similarity(vectors, order) == pytest.approx(float(direct), abs=1e-6)
    neighbours = rng.integers(-1, 30, (30, 3))
    lonely = [b not in neighbours[a] and a not in neighbours[b] for a, b in itertools.pairwise(order)]
    assert jumps(neighbours, order) == sum(lonely)
    assert adjacent_similarity(vectors, order[:1]) == 0.0
    assert sorted(random_order(100).tolist()) == list(range(100))
    assert random_order(0).tolist() == []
