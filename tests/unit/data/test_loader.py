"""The loader against plain-Python expectations: exactly once, independent of the ranks, right labels and positions."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import ConfigError, DataError
from data.loader import IGNORE, Loader
from data.permutation import permute
from data.shards import Shards, open_shards
from tests.unit.data.samples import make_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    rng = np.random.default_rng(0)
    documents = [[*rng.integers(2, 500, rng.integers(0, 30)).tolist(), 0] for _ in range(120)]
    return open_shards(make_shards(tmp_path_factory.mktemp("shards"), documents, 16, shards=3))


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 1000, 100003])
def test_permutation_is_a_bijection(n: int) -> None:
    image = permute(np.arange(n), n, 5, 9)
    assert np.array_equal(np.sort(image), np.arange(n))
    assert n < 64 or not np.array_equal(image, permute(np.arange(n), n, 5, 10))


def test_permutation_scatters_neighbours() -> None:
    image = permute(np.arange(10000), 10000, 1)
    assert np.mean(np.abs(np.diff(image)) == 1) < 0.002
    assert abs(np.corrcoef(np.arange(10000), image)[0, 1]) < 0.05


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 500), st.integers(0, 2**63), st.integers(0, 99))
def test_permutation_of_any_size_and_key(n: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(n), n, seed, epoch)), np.arange(n))


@pytest.mark.parametrize("dp_size", [1, 2, 3, 4, 6, 12])
def test_every_training_window_once_an_epoch_for_any_ranks(shards: Shards, dp_size: int) -> None:
    loader = Loader(shards, batch=12, seed=3, attention="context", eval_fraction=0.1)
    n = loader.train_windows
    steps = -(-2 * n // 12)
    stream = np.concatenate([loader.batch(s, r, dp_size).windows for s in range(steps) for r in range(dp_size)])
    first, second = stream[:n], stream[n : 2 * n]
    held_out = {int(w) for i in range(loader.eval_windows) for w in loader.eval_batch(i, 1).windows}
    assert len(held_out) == loader.eval_windows == round(len(shards) * 0.1)
    assert sorted(first) == sorted(second) == sorted(set(range(len(shards))) - held_out)
    assert not np.array_equal(first, second)
    whole = np.concatenate([loader.batch(s, 0, 1).windows for s in range(steps)])
    assert np.array_equal(stream, whole)


def test_ranks_may_change_in_the_middle_of_an_epoch(shards: Shards) -> None:
    loader = Loader(shards, batch=12, seed=3, attention="document", eval_fraction=0.02)
    sizes = [1, 4, 4, 2, 12, 3, 1, 6, 2, 4]
    stream = [loader.batch(s, r, size) for s, size in enumerate(sizes) for r in range(size)]
    other = Loader(shards, batch=12, seed=3, attention="document", eval_fraction=0.02)
    plain = [other.batch(s, 0, 1) for s in reversed(range(len(sizes)))][::-1]
    for name in ("tokens", "labels", "positions", "document_ids", "windows"):
        left, right = (np.concatenate([getattr(b, name) for b in part]) for part in (stream, plain))
        assert np.array_equal(left, right)


def test_seed_changes_the_order_but_not_what_is_held_out(shards: Shards) -> None:
    one, two = (Loader(shards, 8, seed, "context", 0.1) for seed in (1, 2))
    assert not np.array_equal(one.batch(0, 0, 1).windows, two.batch(0, 0, 1).windows)
    assert np.array_equal(one.eval_batch(0, 5).windows, two.eval_batch(0, 5).windows)


def expected(tokens: list[int], documents: list[int], attention: str) -> tuple[list[int], list[int], list[int]]:
    """Labels, positions and ids of one window, token by token."""
    labels, positions, ids = [], [], []
    for i, document in enumerate(documents):
        same = i > 0 and documents[i - 1] == document
        positions.append((positions[-1] + 1 if same else 0) if attention == "document" else i)
        ids.append(document if attention == "document" or document < 0 else 0)
        last = i + 1 == len(tokens) or document < 0 or documents[i + 1] < 0
        crosses = not last and attention == "document" and documents[i + 1] != document
        labels.append(IGNORE if last or crosses else tokens[i + 1])
    return labels, positions, ids


@pytest.mark.parametrize("attention", ["context", "document"])
def test_labels_positions_and_ids(shards: Shards, attention: str) -> None:
    loader = Loader(shards, batch=len(shards), seed=0, attention=attention, eval_fraction=0.05)
    batch = loader.batch(0, 0, 1)
    padded = 0
    for row, window in enumerate(batch.windows):
        tokens, documents = shards.window(int(window))
        labels, positions, ids = expected(tokens.tolist(), documents.tolist(), attention)
        assert batch.tokens[row].tolist() == tokens.tolist()
        assert batch.labels[row].tolist() == labels
        assert batch.positions[row].tolist() == positions
        assert batch.document_ids[row].tolist() == ids
        padded += documents.tolist().count(-1)
    assert padded > 0
    assert {a.dtype for a in batch.arrays().values()} == {np.dtype(np.int64)}


def test_documents_of_windows_follow_the_packed_text(tmp_path: Path) -> None:
    documents = [[10, 11, 12, 0], [0], [*list(range(20, 40)), 0], [50, 0]]
    shards = open_shards(make_shards(tmp_path, documents, 8))
    tokens, ids = shards.windows(np.arange(len(shards)))
    flat = [(t, i) for i, document in enumerate(documents) for t in document]
    flat += [(1, -1)] * (len(shards) * 8 - len(flat))
    assert list(zip(tokens.ravel().tolist(), ids.ravel().tolist(), strict=True)) == flat


def test_refuses_what_cannot_be_trained_on(tmp_path: Path, shards: Shards) -> None:
    single = open_shards(make_shards(tmp_path, [[5, 6, 0]], 16))
    with pytest.raises(DataError, match="held out"):
        Loader(single, 1, 0, "context", 0.02)
    with pytest.raises(ConfigError, match="multiple of 3"):
        Loader(shards, 8, 0, "context", 0.02).batch(0, 0, 3)
    with pytest.raises(ValueError, match="index"):
        permute([5], 5, 0)
