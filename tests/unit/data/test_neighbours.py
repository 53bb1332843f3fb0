"""Every way to find neighbours through the stage: against exact ones, with what a corpus may hold."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import data.neighbours_cells
from data.groups import MISSING, group_rows
from data.neighbours import find_neighbours, nearest, neighbour_names
from data.neighbours_cells import join_cells
from data.shards import write_array
from data.stages import Stage, serial_units


def found(root: Path, vectors: np.ndarray[Any, Any], kind: str, k: int) -> tuple[np.ndarray[Any, Any], int]:
    """Ids of all documents by ``kind``, and how many are isolated."""
    parts = []
    for index, rows in enumerate(np.array_split(vectors, 3)):
        write_array(root / f"vectors-{index}.npy", rows)
        parts.append({"file": f"vectors-{index}.npy", "documents": len(rows)})
    stage = Stage("order", 1, root / "stage", {"kind": kind})
    shared = {"embedded": str(root), "parts": parts, "k": k, "index": kind}
    search = join_cells if kind == "cells" else find_neighbours
    results = search(stage, shared, len(vectors), serial_units)
    ranges = [result for result in results if "isolated" in result]
    ids = np.concatenate([np.load(root / "stage" / neighbour_names(number)[0]) for number in range(len(ranges))])
    return ids, sum(result["isolated"] for result in ranges)


def clustered(n: int) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(0)
    vectors = (rng.normal(size=(20, 12))[rng.integers(0, 20, n)] + 0.4 * rng.normal(size=(n, 12))).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize(("kind", "recall"), [("flat", 1.0), ("ivf", 0.97), ("hnsw", 0.95), ("cells", 0.95)])
def test_recall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, recall: float) -> None:
    monkeypatch.setattr(data.neighbours_cells, "CELL", 50)
    vectors = clustered(1000)
    ids, isolated = found(tmp_path, vectors, kind, 8)
    truth, _ = nearest(vectors, 0, 1000, 8)
    assert isolated == 0
    assert np.all(ids != np.arange(1000)[:, None])
    assert np.mean([len({*a} & {*b}) / 8 for a, b in zip(ids.tolist(), truth.tolist(), strict=True)]) >= recall


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw", "cells"])
@pytest.mark.parametrize("documents", [1, 2, 5])
def test_fewer_documents_than_k(tmp_path: Path, kind: str, documents: int) -> None:
    ids, _ = found(tmp_path, np.eye(6, dtype=np.float32)[:documents] * 0.6 + 0.3, kind, 8)
    for document, row in enumerate(ids.tolist()):
        assert sorted(row)[-(documents - 1) :] == [x for x in range(documents) if x != document] or documents == 1
        assert row.count(MISSING) == 8 - documents + 1


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw", "cells"])
def test_documents_without_a_vector_are_nobodys_neighbours(tmp_path: Path, kind: str) -> None:
    vectors = clustered(200)
    vectors[::10] = 0
    ids, isolated = found(tmp_path, vectors, kind, 8)
    assert isolated == 20
    assert not {*range(0, 200, 10)} & {*ids[1::10].ravel().tolist()}


@pytest.mark.parametrize("kind", ["ivf", "cells"])
def test_equal_documents_are_indexed_once_and_follow_one_another(tmp_path: Path, kind: str) -> None:
    vectors = np.concatenate([np.repeat(clustered(1), 3000, axis=0), clustered(300)])
    vectors[:3000] += np.random.default_rng(1).uniform(-2e-8, 2e-8, (3000, 12))  # as sums differ in their last bits
    ids, isolated = found(tmp_path, vectors, kind, 5)
    assert isolated == 0
    assert ids[0].tolist() == [1, 2, 3, 4, 5]
    assert np.bincount(ids[:3000].ravel()).max() == 5  # nobody is everybody's neighbour
    assert {*ids[2999].tolist()} <= {*range(3000), 3000}
    groups = group_rows(len(vectors), lambda first, last: vectors[first:last])
    assert len(groups.first) == 301
    assert len({*groups.group[:3000].tolist()}) == 1


@pytest.mark.parametrize("seed", range(5))
def test_groups_against_a_dictionary(seed: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = clustered(40)[rng.integers(0, 40, int(rng.integers(1, 200)))]
    groups = group_rows(len(vectors), lambda first, last: vectors[first:last])
    members: dict[bytes, list[int]] = {}
    for row, vector in enumerate(vectors):
        members.setdefault(vector.tobytes(), []).append(row)
    assert groups.first.tolist() == [rows[0] for rows in members.values()]
    assert groups.members.tolist() == [row for rows in members.values() for row in rows]
    for number, rows in enumerate(members.values()):
        assert groups.group[rows].tolist() == [number] * len(rows)
        assert groups.place[rows].tolist() == list(range(len(rows)))
        for place, row in enumerate(rows):
            expected = (rows[place + 1 :] + rows[:place])[:3]
            assert groups.mates(np.array([row]), 3)[0].tolist() == expected + [MISSING] * (3 - len(expected))
