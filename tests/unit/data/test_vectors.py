"""Corpora of more parts than a process may have files open."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.pack import gather, part_names
from data.vectors import OPEN, Vectors

PARTS = 6 * OPEN


@pytest.fixture(autouse=True)
def _few_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 2 * OPEN + 20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_vectors_of_many_parts(tmp_path: Path) -> None:
    everything = np.random.default_rng(0).normal(size=(2 * PARTS, 3)).astype(np.float32)
    parts: list[dict[str, Any]] = []
    for number in range(PARTS):
        np.save(tmp_path / f"{number}.npy", everything[2 * number : 2 * number + 2])
        parts.append({"file": f"{number}.npy", "documents": 2})
    vectors, order = Vectors(tmp_path, parts), np.random.default_rng(1).permutation(2 * PARTS)
    assert len(vectors) == 2 * PARTS
    assert np.array_equal(vectors(order), everything[order])


def test_tokens_of_many_parts(tmp_path: Path) -> None:
    parts: list[dict[str, Any]] = []
    for number in range(PARTS):
        tokens, offsets = (tmp_path / name for name in part_names(number))
        tokens.parent.mkdir(parents=True, exist_ok=True)
        np.array([number, number, number + 1], dtype=np.uint16).tofile(tokens)
        with offsets.open("wb") as file:
            np.save(file, np.array([0, 2, 3]))
        parts.append({"index": number, "documents": 2, "dtype": "uint16"})
    order = np.random.default_rng(1).permutation(2 * PARTS)
    found = list(gather(tmp_path, parts, order))
    assert [tokens.tolist() for tokens in found] == [
        [document // 2 + 1] if document % 2 else [document // 2] * 2 for document in order.tolist()
    ]
