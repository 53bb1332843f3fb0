"""The scorer: fastText's own probabilities, the zeroed end of line, what it reports, and what it refuses."""

import hashlib
import json
from pathlib import Path
from typing import Any

import fasttext
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import DataError
from data.preselect.linear import LinearScorer, load_linear, prepare, save_linear, word_hashes
from data.preselect.scorer import LINEAR, MODEL, auc, calibration, split, train_unit

GOOD, BAD = (
    ["alpha", "beta", "gamma", "delta", "été", "数学"],
    ["click", "cookie", "subscribe", "gamma", "naïve", "новый"],
)


def write_sample(folder: Path, count: int = 60, long: int = 12) -> None:
    random = np.random.default_rng(0)
    labels = [1, 0] * count
    texts = [
        "\n".join(" ".join(random.choice(GOOD if label else BAD, long)) for _ in range(2 + 2 * label))
        for label in labels
    ]
    pq.write_table(pa.table({"text": texts}), folder / "part.parquet")
    pq.write_table(pa.table({"label": pa.array(labels, pa.int8())}), folder / "strength.parquet")


def work(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "lr": 0.5, "dim": 16, "epochs": 5, "word_ngrams": 2, "buckets": 5000, "held_out": 0.25, "seed": 3,
        "parts": [str(folder / "part.parquet")], "strength": str(folder / "strength.parquet"), "ladder": [],
        "folder": str(folder / "scorer"), "marker": str(folder / "marker.json"), "fingerprint": "f",
    } | changes  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("scorer")
    write_sample(folder)
    return folder / "scorer", train_unit(work(folder))


def library(model: Any, text: str) -> float:
    """fastText's own probability of label 1; it adds 1e-5 to what it reports."""
    answers = model.f.predict(prepare(text) + "\n", 2, 0.0, "strict")
    return {label: probability - 1e-5 for probability, label in answers}["__label__1"]


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@settings(max_examples=80, deadline=None)
@given(texts=st.lists(st.lists(st.one_of(st.sampled_from(GOOD + BAD), words), max_size=30), min_size=1, max_size=5))
def test_probabilities_are_fasttexts(trained: tuple[Path, dict[str, Any]], texts: list[list[str]]) -> None:
    scorer, model = load_linear(trained[0] / LINEAR), fasttext.load_model(str(trained[0] / MODEL))
    joined = [" ".join(text) for text in texts]
    found = 1 / (1 + np.exp(-scorer.log_odds(joined)))
    assert found == pytest.approx([library(model, text) for text in joined], abs=1e-6)


@pytest.mark.parametrize("ngrams", [1, 2, 3])
def test_n_grams_of_other_orders(tmp_path: Path, ngrams: int) -> None:
    write_sample(tmp_path)
    train_unit(work(tmp_path, word_ngrams=ngrams))
    scorer, model = load_linear(tmp_path / "scorer" / LINEAR), fasttext.load_model(str(tmp_path / "scorer" / MODEL))
    for text in ("", "alpha", "alpha beta", "alpha click unknown word gamma delta", "tabs\tand\x0bothers\x0c\r\nx\0y"):
        assert 1 / (1 + np.exp(-scorer.log_odds([text])[0])) == pytest.approx(library(model, text), abs=1e-6)


def test_ends_and_labels_inside_a_text_are_text(trained: tuple[Path, dict[str, Any]]) -> None:
    scorer = load_linear(trained[0] / LINEAR)
    plain, marked = scorer.log_odds(["alpha beta gamma", "alpha </s> beta\0gamma"])
    assert plain == marked
    assert prepare("a __label__1 b") == "a label 1 b"


def test_the_end_of_line_says_nothing(trained: tuple[Path, dict[str, Any]]) -> None:
    scorer = load_linear(trained[0] / LINEAR)
    assert scorer.rows[scorer.words.index(b"</s>")] == 0.0
    assert scorer.log_odds([""])[0] == 0.0


def test_same_labels_give_the_same_model(tmp_path: Path, trained: tuple[Path, dict[str, Any]]) -> None:
    write_sample(tmp_path)
    again = train_unit(work(tmp_path))
    assert again == trained[1]
    digest = [hashlib.sha256((folder / MODEL).read_bytes()).hexdigest() for folder in (trained[0], tmp_path / "scorer")]
    assert digest[0] == digest[1]
    assert not (tmp_path / "scorer" / "train.txt").exists()


def test_card_says_how_well_it_works(trained: tuple[Path, dict[str, Any]]) -> None:
    card = json.loads((trained[0] / "card.json").read_text())
    assert card["auc"] == 1.0
    assert (card["positives"], card["negatives"], card["held_out"]) == (60, 60, 30)
    assert {row["word"] for row in card["influence"]["positive"]} <= set(GOOD)
    assert {row["word"] for row in card["influence"]["negative"]} <= set(BAD)
    assert sum(row["documents"] for row in card["calibration"]) == 30
    assert "AUC on held-out documents: 1.0000" in (trained[0] / "README.md").read_text()


def test_auc_against_all_pairs() -> None:
    random = np.random.default_rng(0)
    odds, labels = random.integers(0, 9, 60).astype(float), random.integers(0, 2, 60).astype(np.int8)
    pairs = [(a > b) + (a == b) / 2 for a in odds[labels == 1] for b in odds[labels == 0]]
    assert auc(odds, labels) == pytest.approx(np.mean(pairs))
    rows = calibration(odds - 4, labels)
    assert sum(row["documents"] for row in rows) == 60
    assert all(row["from"] <= row["probability"] <= row["from"] + 0.1 for row in rows)


def test_hashes_are_fnv_with_signed_bytes() -> None:
    def slow(word: bytes) -> int:
        h = 2166136261
        for byte in word:
            h = ((h ^ ((byte - 256 if byte > 127 else byte) & 0xFFFFFFFF)) * 16777619) & 0xFFFFFFFF
        return h

    found = ["a", "", "été", "longer words too", "数学", "a"]
    assert word_hashes([w.encode() for w in found]).tolist() == [slow(w.encode()) for w in found]
    assert word_hashes([]).tolist() == []


def test_too_few_documents_are_refused() -> None:
    assert split(np.array([0, 0, 1, 1], dtype=np.int8), 0.1, 0).sum() == 2
    with pytest.raises(DataError, match="label 1"):
        split(np.array([0, 0, 1], dtype=np.int8), 0.1, 0)


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="sundog scorer"):
        load_linear(tmp_path)
    save_linear(LinearScorer([b"a", b"b"], np.zeros(5), 2), tmp_path)
    assert load_linear(tmp_path).words == [b"a", b"b"]
    (tmp_path / "words.txt").write_bytes(b"a\nb\nc")
    with pytest.raises(DataError, match="3 words"):
        load_linear(tmp_path)
    (tmp_path / "rows.npy").write_bytes(b"no")
    with pytest.raises(DataError, match="sundog scorer"):
        load_linear(tmp_path)
