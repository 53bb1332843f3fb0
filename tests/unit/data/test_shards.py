"""Packed folders: what is written is read back, and damage is found at opening."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import DataError
from data.shards import open_shards, token_dtype
from tests.unit.data.samples import make_shards

DOCUMENTS = [[7, 8, 9, 0], [10, 0], [*list(range(100, 150)), 0]]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 70000), max_size=40), min_size=1, max_size=12),
    st.integers(1, 20),
    st.integers(1, 3),
)
def test_roundtrip(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], context: int, count: int
) -> None:
    folder = tmp_path_factory.mktemp("s")
    shards = open_shards(make_shards(folder, documents, context, vocab_size=70001, shards=count))
    tokens, ids = shards.windows(np.arange(len(shards)))
    real = ids >= 0
    assert tokens[real].tolist() == [t for d in documents for t in d]
    assert ids[real].tolist() == [i for i, d in enumerate(documents) for _ in d]
    assert set(tokens[~real].tolist()) <= {1}
    assert (~real).sum() < context * count


def test_narrowest_dtype() -> None:
    assert (token_dtype(65536), token_dtype(65537)) == ("uint16", "uint32")


@pytest.mark.parametrize("damage", ["truncate", "remove", "extend"])
@pytest.mark.parametrize("name", ["tokens-00000.bin", "spans-00000.npy", "pointers-00000.npy"])
def test_damaged_file_is_a_data_error(tmp_path: Path, name: str, damage: str) -> None:
    path = make_shards(tmp_path, DOCUMENTS, 8) / name
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content[:-3] if damage == "truncate" else content + b"x")
    with pytest.raises(DataError, match=name):
        open_shards(tmp_path)


def test_unfinished_folder_is_a_data_error(tmp_path: Path) -> None:
    make_shards(tmp_path, DOCUMENTS, 8)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(DataError, match="sundog pack"):
        open_shards(tmp_path)


def test_manifest_that_contradicts_its_files(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path, DOCUMENTS, 8) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"context": 8', '"context": 16'))
    with pytest.raises(DataError, match="agrees"):
        open_shards(tmp_path)


def test_another_tokenizer_is_a_data_error(tmp_path: Path) -> None:
    shards = open_shards(make_shards(tmp_path, DOCUMENTS, 8))
    shards.require_tokenizer("0" * 64)
    with pytest.raises(DataError, match="tokenizer"):
        shards.require_tokenizer("1" * 64)


def test_window_numbers_are_checked(tmp_path: Path) -> None:
    shards = open_shards(make_shards(tmp_path, DOCUMENTS, 8))
    with pytest.raises(IndexError):
        shards.window(len(shards))
