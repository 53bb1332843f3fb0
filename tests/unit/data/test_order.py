"""Embeddings, neighbours and orders: exact where exactness is claimed, related where relatedness is."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import DataError
from conf.schema import RunConfig
from data.curate import curate
from data.embedders.tfidf import fit_components
from data.groups import MISSING
from data.manifest import read_manifest
from data.neighbours import nearest
from data.order import ORDER, order
from data.stages import serial_units, stage_folders
from data.vectors import load_vectors
from tests.unit.data.samples import TOPICS, make_config, write_jsonl


def curated(root: Path, documents: int, **data: Any) -> RunConfig:
    config = make_config(root, write_jsonl(root / "c.jsonl", documents), **data)
    curate(config, serial_units)
    return config


def unit_vectors(values: list[list[int]]) -> np.ndarray[Any, Any]:
    vectors = np.array(values, dtype=np.float32)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)


# Unit vectors whose products are exact in floating point, so that ties are ties.
EXACT = [v for v in itertools.product((-1, 0, 1), repeat=4) if sum(map(abs, v)) in (1, 4)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(EXACT), min_size=1, max_size=60), st.integers(1, 12))
def test_neighbours_are_exact_with_ties_by_id(values: list[tuple[int, ...]], k: int) -> None:
    vectors = unit_vectors([list(value) for value in values])
    n = len(vectors)
    scores = vectors @ vectors.T
    ids, similarities = nearest(vectors, 0, n, k)
    for i in range(n):
        expected = sorted((j for j in range(n) if j != i), key=lambda j: (-scores[i, j], j))[:k]
        assert ids[i].tolist() == expected + [MISSING] * (k - len(expected))
        assert similarities[i].tolist() == scores[i, expected].tolist() + [0.0] * (k - len(expected))


def test_neighbours_against_numpy() -> None:
    rng = np.random.default_rng(5)
    vectors = rng.normal(size=(200, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    scores = vectors @ vectors.T - 3 * np.eye(200)
    ids, similarities = nearest(vectors, 0, 200, 10)
    assert np.array_equal(ids, np.argsort(-scores, axis=1)[:, :10])
    assert similarities == pytest.approx(-np.sort(-scores, axis=1)[:, :10], abs=2e-6)


def test_ties_beyond_what_is_fetched_at_first() -> None:
    vectors = np.repeat(unit_vectors([[1, 0], [0, 1]]), 60, axis=0)
    ids, _ = nearest(vectors, 100, 103, 4)
    assert ids.tolist() == [[60, 61, 62, 63]] * 3
    ids, _ = nearest(vectors, 61, 62, 4)
    assert ids.tolist() == [[60, 62, 63, 64]]


def test_ranges_join_to_the_whole() -> None:
    rng = np.random.default_rng(0)
    vectors = unit_vectors(rng.integers(-50, 50, (90, 8)).tolist())
    whole, _ = nearest(vectors, 0, 90, 7)
    parts = [nearest(vectors, first, min(first + 32, 90), 7)[0] for first in range(0, 90, 32)]
    assert np.array_equal(whole, np.concatenate(parts))


def test_components_are_the_leading_singular_vectors() -> None:
    rng = np.random.default_rng(1)
    dense = (rng.normal(size=(60, 4)) * [9, 6, 3, 0.5]) @ rng.normal(size=(4, 40))
    components = fit_components(sp.csr_matrix(dense.astype(np.float32)), 3)
    right = np.linalg.svd(dense, full_matrices=False)[2][:3]
    assert np.abs(components @ right.T) == pytest.approx(np.eye(3), abs=1e-3)


def test_related_documents_become_neighbours_in_the_order(tmp_path: Path) -> None:
    config = curated(tmp_path, 60)
    manifest = order(config, serial_units)
    path = np.load(stage_folders(config).ordered / ORDER)
    assert sorted(path.tolist()) == list(range(60))
    topics = path % len(TOPICS)  # documents are about the five topics in turn
    assert np.mean(topics[1:] == topics[:-1]) > 0.9
    figures = manifest.figures
    assert figures["documents"] == 60
    assert figures["adjacent_similarity"] > figures["random_similarity"] + 0.3
    assert figures["jumps"] < 25  # a random order has about 50
    assert [entry["stage"] for entry in manifest.lineage][-2:] == ["curate", "embed"]
    assert order(config, serial_units).reused


def test_vectors_are_normalised_and_centred(tmp_path: Path) -> None:
    config = curated(tmp_path, 30)
    order(config, serial_units)
    folder = stage_folders(config).embedded
    vectors = load_vectors(folder, read_manifest(folder).figures["parts"])
    assert vectors.dtype == np.float32
    assert vectors.shape == (30, 16)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(30), abs=1e-5)
    assert np.abs(vectors.mean(axis=0)).max() < 0.2


@pytest.mark.parametrize("documents", [1, 2, 3])
def test_tiny_corpora(tmp_path: Path, documents: int) -> None:
    config = curated(tmp_path, documents)
    manifest = order(config, serial_units)
    assert sorted(np.load(stage_folders(config).ordered / ORDER).tolist()) == list(range(documents))
    assert manifest.figures["documents"] == documents


def test_documents_without_words(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    for i in range(5):
        (tmp_path / "c" / f"{i}.txt").write_text(f"{chr(97 + i)} ! " * 200)
    config = make_config(tmp_path, tmp_path / "c")
    config.curation.min_letter_fraction = 0.0
    curate(config, serial_units)
    assert order(config, serial_units).figures["documents"] == 5
    assert sorted(np.load(stage_folders(config).ordered / ORDER).tolist()) == list(range(5))


def test_random_order_is_a_fixed_permutation_and_embeds_nothing(tmp_path: Path) -> None:
    config = curated(tmp_path, 40)
    config.order.kind = "random"
    manifest = order(config, serial_units)
    path = np.load(stage_folders(config).ordered / ORDER)
    assert sorted(path.tolist()) == list(range(40))
    assert path.tolist() != list(range(40))
    assert manifest.figures == {
        "documents": 40,
        "adjacent_similarity": None,
        "random_similarity": None,
        "jumps": None,
    }
    assert not stage_folders(config).embedded.exists()


def test_same_corpus_same_bytes(tmp_path: Path) -> None:
    one, two = curated(tmp_path / "one", 50), curated(tmp_path / "two", 50)
    assert order(one, serial_units).files == order(two, serial_units).files


def test_order_needs_curated_documents_of_one_state(tmp_path: Path) -> None:
    config = make_config(tmp_path, write_jsonl(tmp_path / "c.jsonl", 12))
    with pytest.raises(DataError, match="sundog curate"):
        order(config, serial_units)
    before = curate(config, serial_units)
    order(config, serial_units)
    config.curation.min_chars, config.data.overwrite = 100, True
    after = curate(config, serial_units)
    config.data.overwrite = False
    with pytest.raises(DataError, match="parent") as caught:
        order(config, serial_units)
    assert before.fingerprint[:16] in str(caught.value)
    assert after.fingerprint[:16] in str(caught.value)
    config.data.overwrite = True
    assert order(config, serial_units).lineage[-2]["fingerprint"] == after.fingerprint


def test_other_neighbours_keep_the_embedding(tmp_path: Path) -> None:
    config = curated(tmp_path, 20)
    order(config, serial_units)
    vectors = (stage_folders(config).embedded / "vectors-00000.npy").stat().st_mtime_ns
    config.order.neighbours, config.data.overwrite = 3, True
    assert not order(config, serial_units).reused
    assert (stage_folders(config).embedded / "vectors-00000.npy").stat().st_mtime_ns == vectors
