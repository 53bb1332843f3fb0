"""Selection: the weighted quantile against a sort, and curation that keeps the best share and scores nothing twice."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import ConfigError, DataError
from data.curate import curate
from data.preselect.linear import LinearScorer, save_linear
from data.preselect.select import Rows, ordered_bits, thresholds
from data.stages import serial_units, stage_folders
from data.steps import preselect
from tests.unit.data.samples import make_config, write_jsonl


def by_sorting(scores: Any, weights: Any, keep: float) -> Any:
    """Which rows stay: from the highest score down until the share is reached, equal scores together."""
    order = np.argsort(-scores, kind="stable")
    goal = max(1, int(np.ceil(keep * weights.sum())))
    reached = np.searchsorted(np.cumsum(weights[order]), goal)
    return scores >= scores[order[min(reached, len(order) - 1)]]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 200),
    st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
    st.integers(1, 5),
    st.booleans(),
)
def test_equals_a_sort(seed: int, count: int, keep: float, pieces: int, ties: bool) -> None:
    random = np.random.default_rng(seed)
    scores = random.normal(size=count).astype(np.float32)
    scores = np.round(scores) if ties else scores
    weights, groups = random.integers(1, 5000, count), random.choice(["a", "b"], count).astype(object)

    def passes() -> Any:
        for rows in np.array_split(np.arange(count), pieces):
            part: Rows = (scores[rows], weights[rows], groups[rows])
            yield part

    found = thresholds(passes, keep)
    for group in found:
        mine = groups == group
        stays = ordered_bits(scores[mine]).astype(np.int64) >= found[group]
        np.testing.assert_array_equal(stays, by_sorting(scores[mine], weights[mine], keep))
        assert weights[mine][stays].sum() >= keep * weights[mine].sum()


def test_bits_order_as_scores_do() -> None:
    scores = np.array([-np.inf, -3e38, -1.5, -1e-40, 0.0, 1e-40, 2.5, 3e38, np.inf], np.float32)
    assert (np.diff(ordered_bits(scores).astype(np.int64)) > 0).all()
    same = ordered_bits(np.array([0.0, -0.0], np.float32))
    assert same[0] == same[1]
    assert ordered_bits(np.array([np.nan], np.float32))[0] == ordered_bits(scores[:1])[0]


@pytest.fixture
def config(tmp_path: Path) -> Any:
    """Forty documents about five topics; the scorer likes the words of two of them."""
    write_jsonl(tmp_path / "c" / "a.jsonl", 25)
    write_jsonl(tmp_path / "c" / "b.jsonl", 15, start=25)
    words = [b"</s>", b"rivers", b"ovens", b"engines"]
    save_linear(LinearScorer(words, np.array([0.0, 9.0, 4.0, -5.0, *[0.0] * 50]), 2), tmp_path / "scorer" / "linear")
    config = make_config(tmp_path, tmp_path / "c")
    config.curation.preselect.enabled, config.curation.preselect.scorer = True, str(tmp_path / "scorer")
    config.data.overwrite = True
    return config


def kept(config: Any) -> list[dict[str, Any]]:
    folder, manifest = stage_folders(config).curated, curate(config, serial_units)
    return [row for part in manifest.figures["parts"] for row in pq.read_table(folder / part["file"]).to_pylist()]


def test_keeps_the_best_share_and_names_the_reason(config: Any) -> None:
    config.curation.preselect.keep, config.curation.preselect.weight = 0.2, "documents"
    rows = kept(config)
    assert len(rows) == 8
    assert all("rivers" in row["text"] for row in rows)
    assert curate(config, serial_units).figures["dropped"] == {"preselect": 32}
    config.curation.preselect.weight, config.curation.preselect.keep = "chars", 0.4
    assert {("rivers" in row["text"], "ovens" in row["text"]) for row in kept(config)} == {(True, False), (False, True)}


def test_another_share_scores_nothing_again(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(kept(config)) < len(write_count(config, 1.0))

    def never(*_: Any) -> None:
        raise AssertionError("scored a document again")

    monkeypatch.setattr(preselect.Scored, "columns", never)
    assert len(write_count(config, 0.5)) < len(write_count(config, 1.0)) == 40


def write_count(config: Any, keep: float) -> list[dict[str, Any]]:
    config.curation.preselect.keep = keep
    return kept(config)


def test_per_source(config: Any) -> None:
    config.curation.preselect.keep, config.curation.preselect.weight = 0.2, "documents"
    config.curation.preselect.per_source = True
    sources = [row["source"] for row in kept(config)]
    assert {name: sources.count(name) for name in set(sources)} == {"a.jsonl": 5, "b.jsonl": 3}


def test_a_scorer_that_is_not_there_is_refused(config: Any, tmp_path: Path) -> None:
    config.curation.preselect.scorer = str(tmp_path / "nothing")
    with pytest.raises(DataError, match="sundog scorer"):
        curate(config, serial_units)
    config.curation.preselect.scorer = ""
    with pytest.raises(ConfigError, match="names the folder"):
        curate(config, serial_units)
