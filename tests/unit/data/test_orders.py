"""Every order against a slow reading of it, on graphs of every shape."""

import itertools
from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.metrics import adjacent_similarity, compression_gain, jumps, neighbour_share, pair_similarity
from data.neighbours import search
from data.orders import ORDERS
from data.orders.algorithm1 import walk
from data.orders.fragments import lonely, match, traverse
from data.orders.graph import Array, Graph, Lists, build_graph
from data.orders.matching import _turns, join_fragments, settle
from data.orders.partitioned import assign, match_partition
from data.orders.reference import chained, reference
from tests.helpers.orders import algorithm1, matching_links, reference_chains, reference_order, undirected


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    faiss.omp_set_num_threads(1)


def random_lists(rng: np.random.Generator, n: int, kind: int) -> tuple[Array, Array]:
    """Neighbour lists with missing ids, self loops and repeated ids; hubs, ties or NaNs by ``kind``."""
    k = int(rng.integers(1, 13))
    ids = rng.integers(-1, n, (n, k)).astype(np.int32)
    if kind % 3 == 0:
        ids[rng.random((n, k)) < 0.5] = rng.integers(0, n)
    values = [0, 0.25, 0.5, 0.75, 1, -0.1, np.nan] if kind % 2 else rng.random(20)
    return ids, rng.choice(values, (n, k)).astype(np.float32)


def neighbours_in(graph: Graph, node: int) -> list[int]:
    return (graph.edges[graph.pointers[node] : graph.pointers[node + 1]] & graph.mask).tolist()


@pytest.mark.parametrize("seed", range(2))
def test_orders_equal_their_oracles(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for kind in range(150):
        n = int(rng.integers(1, 51))
        ids, weights = random_lists(rng, n, kind)
        edges = undirected(ids.tolist(), weights.tolist())
        graph = build_graph(Lists([(ids[: n // 2], weights[: n // 2]), (ids[n // 2 :], weights[n // 2 :])]))
        for node in range(n):
            assert neighbours_in(graph, node) == sorted(edges[node], key=lambda x: (-edges[node][x], x))
        assert walk(graph).tolist() == algorithm1(edges)
        links, ends = lonely(n)
        match(graph, links, ends)
        assert [set(row) - {-1} for row in links.tolist()] == matching_links(edges)
        path, bounds = traverse(links, np.flatnonzero(ends >= np.arange(n)))
        assert sorted(path.tolist()) == list(range(n))
        assert bounds[-1] == n
        assert chained(ids).tolist() == [x for chain in reference_chains(ids.tolist()) for x in chain]
        assert reference(ids).tolist() == reference_order(ids.tolist())


@pytest.mark.parametrize("copies", [40, 150, 400])
def test_chains_of_equal_edges_are_followed_as_rounds_would(copies: int) -> None:
    """Copies of one document, each with those that follow it: every edge waits for the one before."""
    rng = np.random.default_rng(copies)
    ids = (np.arange(copies)[:, None] + np.arange(1, 7)) % copies
    ids[rng.random(ids.shape) < 0.1] = -1
    numbers = rng.permutation(copies) if copies == 150 else np.arange(copies)
    ids = np.where(ids < 0, -1, numbers[ids])[np.argsort(numbers)].astype(np.int32)
    weights: Array = np.ones(ids.shape, dtype=np.float32)
    links, ends = lonely(copies)
    match(build_graph(Lists([(ids, weights)])), links, ends)
    assert [set(row) - {-1} for row in links.tolist()] == matching_links(undirected(ids.tolist(), weights.tolist()))


@pytest.mark.parametrize("kind", ORDERS)
def test_ten_thousand_graphs_give_permutations(kind: str) -> None:
    rng = np.random.default_rng(7)
    for number in range(1000 if kind == "matching" else 3000):
        n = int(rng.integers(1, 51))
        vectors = rng.normal(size=(n, 3)).astype(np.float32)
        vectors[rng.random(n) < 0.1] = 0
        path = ORDERS[kind](Lists([random_lists(rng, n, number)]), vectors.__getitem__)
        assert sorted(path.tolist()) == list(range(n))


@pytest.mark.parametrize("kind", ORDERS)
def test_no_documents_no_edges_and_one_hub(kind: str) -> None:
    def order(lists: Lists) -> Array:
        return ORDERS[kind](lists, lambda d: np.ones((len(d), 2), dtype=np.float32))

    assert order(Lists([(np.zeros((0, 3), dtype=np.int32), np.zeros((0, 3), dtype=np.float32))])).tolist() == []
    nothing = np.full((4, 2), -1, dtype=np.int32), np.zeros((4, 2), dtype=np.float32)
    assert sorted(order(Lists([nothing])).tolist()) == [0, 1, 2, 3]
    hub = np.zeros((300, 2), dtype=np.int32), np.ones((300, 2), dtype=np.float32)  # rows of 299: the long way
    assert sorted(order(Lists([hub])).tolist()) == list(range(300))


def test_equal_documents_are_joined_in_levels_that_shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their fragments have equal means, and lists of the nearest alone would join a few of them in a level."""
    searched: list[int] = []

    def counted(vectors: Array, k: int) -> tuple[Array, Array]:
        searched.append(len(vectors))
        return search(vectors, k)

    monkeypatch.setattr("data.orders.matching.search", counted)
    for n in (1000, 4000):
        searched.clear()
        vectors = np.repeat(np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32), n // 2, axis=0)
        nearest = np.where(np.arange(n)[:, None] < n // 2, np.arange(10), n // 2 + np.arange(10)).astype(np.int32)
        lists = Lists([(nearest, np.ones(nearest.shape, dtype=np.float32))])
        path = ORDERS["matching"](lists, vectors.__getitem__)
        assert sorted(path.tolist()) == list(range(n))
        assert np.count_nonzero(np.diff(path >= n // 2)) == 1
        assert sum(searched) < 2 * n
        assert len(searched) <= np.log2(n)


def clustered(n: int, seed: int = 0) -> tuple[Lists, npt.NDArray[np.float32]]:
    """Documents in clusters of about thirty, with their exact neighbours."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(n // 30, 16))
    vectors = (centres[rng.integers(0, len(centres), n)] + 0.5 * rng.normal(size=(n, 16))).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    scores = vectors @ vectors.T - 3 * np.eye(n, dtype=np.float32)
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :10].astype(np.int32)
    return Lists([(ids, np.take_along_axis(scores, ids, axis=1))]), vectors


def test_related_orders_are_related() -> None:
    lists, vectors = clustered(1500)
    figures = {}
    for kind, order in ORDERS.items():
        path = order(lists, vectors.__getitem__)
        windows = np.arange(1500) // 50
        share = neighbour_share(lists.neighbours(), path, windows)
        figures[kind] = (
            adjacent_similarity(vectors.__getitem__, path),
            pair_similarity(vectors.__getitem__, path, windows),
            *share,
        )
    assert all(a > b for a, b in zip(figures["matching"][:3], figures["reference"], strict=False))
    assert all(a > b + 0.3 for a, b in zip(figures["algorithm1"][:3], figures["random"], strict=False))


def test_the_order_does_not_depend_on_how_lists_are_split_or_sorted() -> None:
    lists, vectors = clustered(600)
    ids, weights = lists.parts[0]
    assert isinstance(ids, np.ndarray)
    assert isinstance(weights, np.ndarray)
    split = Lists([(ids[i : i + 77], weights[i : i + 77]) for i in range(0, 600, 77)])
    for kind in ("algorithm1", "matching", "reference"):
        order = ORDERS[kind]
        assert np.array_equal(order(lists, vectors.__getitem__), order(split, vectors.__getitem__))
    mixed = Lists([(ids[:, ::-1].copy(), weights[:, ::-1].copy())])
    assert np.array_equal(walk(build_graph(lists)), walk(build_graph(mixed)))


@pytest.mark.parametrize("partitions", [4, 16])
def test_partitions_cost_less_than_a_hundredth(tmp_path: Path, partitions: int) -> None:
    lists, vectors = clustered(3000)
    whole = adjacent_similarity(vectors.__getitem__, ORDERS["matching"](lists, vectors.__getitem__))
    where = assign(3000, vectors.__getitem__, partitions)
    pieces = [match_partition(lists, np.flatnonzero(where == number)) for number in range(partitions)]
    sizes = np.concatenate([np.diff(bounds) for _, bounds in pieces])
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    joined = join_fragments(np.concatenate([path for path, _ in pieces]), bounds, vectors.__getitem__, tmp_path)
    path = settle(joined, lists.neighbours())
    assert sorted(path.tolist()) == list(range(3000))
    assert adjacent_similarity(vectors.__getitem__, path) > 0.99 * whole


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 9))
def test_turns_are_the_best_of_all(seed: int, count: int) -> None:
    gains = np.random.default_rng(seed).normal(size=(count, 2, 2))

    def total(turns: tuple[int, ...]) -> float:
        return sum(float(gains[i, turns[i], turns[i + 1]]) for i in range(count))

    best = max(total(turns) for turns in itertools.product((0, 1), repeat=count + 1))
    assert total(tuple(_turns(gains).tolist())) == pytest.approx(best)


def test_metrics_against_direct_sums() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(30, 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    order = rng.permutation(30)
    direct = np.mean([vectors[a] @ vectors[b] for a, b in itertools.pairwise(order)])
    assert adjacent_similarity(vectors.__getitem__, order) == pytest.approx(float(direct), abs=1e-6)
    neighbours = rng.integers(-1, 30, (30, 3))
    lonely_pairs = [b not in neighbours[a] and a not in neighbours[b] for a, b in itertools.pairwise(order)]
    assert jumps(neighbours, order).tolist() == lonely_pairs
    windows = np.sort(rng.integers(0, 6, 30))
    groups = [order[windows == w].tolist() for w in np.unique(windows)]
    pairs = [np.mean([vectors[a] @ vectors[b] for a, b in itertools.combinations(g, 2)]) for g in groups if len(g) > 1]
    assert pair_similarity(vectors.__getitem__, order, windows) == pytest.approx(float(np.mean(pairs)), abs=1e-6)
    near = [[bool(({*neighbours[d].tolist()} - {d}) & {*g}) for d in g] for g in groups]
    share = np.mean([x for g in near for x in g]), np.mean([all(g) for g in near])
    assert neighbour_share(neighbours, order, windows) == pytest.approx(share)
    assert adjacent_similarity(vectors.__getitem__, order[:1]) == 0.0


def test_compression_gain_sees_what_documents_share() -> None:
    rng = np.random.default_rng(1)
    words = ["".join(chr(97 + c) for c in rng.integers(0, 26, 7)) for _ in range(400)]
    topics = [" ".join(rng.choice(words[i * 40 : i * 40 + 40], 200)) for i in (0, 0, 1, 1)]
    assert compression_gain([topics[:2], topics[2:]]) > compression_gain([topics[::2], topics[1::2]]) + 0.1
    assert compression_gain([]) == 0.0
