"""Near duplicates: planted ones are found, pairs are judged by their true similarity, buckets change nothing."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from conf.schema import RunConfig
from data import near
from data.curate import curate
from data.near import _neighbours
from data.stages import serial_units, stage_folders
from data.steps.minhash import WORD, MinHash, _functions, shingles, signature, word_hashes
from tests.unit.data.samples import make_config
from tests.unit.data.test_curate import kept, rejected

CHANCE = random.Random(5)
VOCABULARY = ["".join(CHANCE.choices("abcdefghijklmnoprstuvw", k=CHANCE.randint(2, 9))) for _ in range(3000)]


def article(words: int) -> list[str]:
    return CHANCE.choices(VOCABULARY, k=words)


def jaccard(one: str, two: str, size: int = 5) -> float:
    """Of the sets of shingles, as tuples of words."""
    a, b = one.lower().split(), two.lower().split()
    first, second = ({tuple(w[i : i + size]) for i in range(max(1, len(w) - size + 1))} for w in (a, b))
    return len(first & second) / len(first | second)


def corpus(path: Path) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """120 articles, of 60 an exact copy in other case and of 60 one without 2 % of the words: texts and the pairs."""
    texts, pairs = {}, []
    for number in range(120):
        words = article(CHANCE.randint(120, 400))
        texts[f"a{number}"] = " ".join(words)
        gone = 0.0 if number < 60 else 0.02
        again = [word for word in words if CHANCE.random() >= gone]
        texts[f"b{number}"] = " ".join(again).capitalize() + "."
        pairs.append((f"a{number}", f"b{number}"))
    names = list(texts)
    CHANCE.shuffle(names)
    path.write_text("".join(json.dumps({"id": name, "text": texts[name]}) + "\n" for name in names))
    return texts, pairs


def near_config(root: Path, path: Path) -> RunConfig:
    config = make_config(root, path)
    config.curation.minhash.enabled = True
    return config


def test_planted_near_duplicates(tmp_path: Path) -> None:
    texts, pairs = corpus(tmp_path / "c.jsonl")
    config = near_config(tmp_path / "one", tmp_path / "c.jsonl")
    manifest = curate(config, serial_units)
    folder = stage_folders(config).curated
    rows = [row["id"] for row in kept(folder, manifest)]
    dropped = rejected(folder)
    assert set(dropped.values()) == {"near_duplicate"}
    assert all((a in dropped) or (b in dropped) for a, b in pairs[:60])  # punctuation and case are no difference
    assert sum((a in dropped) or (b in dropped) for a, b in pairs[60:]) >= 57
    for a, b in pairs:
        if a in dropped or b in dropped:
            assert jaccard(texts[a], texts[b].rstrip(".")) >= 0.7
            assert (a in dropped) != (b in dropped)
    assert len(rows) + len(dropped) == len(texts)

    bounded = near_config(tmp_path / "two", tmp_path / "c.jsonl")
    bounded.curation.bucket_documents = 50
    again = curate(bounded, serial_units)
    assert [row["id"] for row in kept(stage_folders(bounded).curated, again)] == rows


def test_a_chain_of_similar_documents_keeps_its_first(tmp_path: Path) -> None:
    words = article(300)
    chain = [words[shift : shift + 250] for shift in (0, 12, 24, 36, 48)]
    texts = {f"c{i}": " ".join(piece) for i, piece in enumerate(chain)}
    assert jaccard(texts["c0"], texts["c4"]) < 0.8 < jaccard(texts["c0"], texts["c1"])
    path = tmp_path / "c.jsonl"
    others = {f"o{i}": " ".join(article(40)) for i in range(260)}  # of a batch without a candidate
    rows = {**others, **texts}
    path.write_text("".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in rows.items()))
    config = near_config(tmp_path, path)
    config.data.shard_documents, config.curation.min_chars = 1000, 1
    config.curation.minhash.min_jaccard = 0.8
    manifest = curate(config, serial_units)
    assert [row["id"] for row in kept(stage_folders(config).curated, manifest)] == [*others, "c0"]
    config.curation.minhash.min_jaccard, config.data.overwrite = 0.99, True
    assert curate(config, serial_units).figures["kept"] == 265


@pytest.mark.parametrize("text", ["", "...", "one", "two words", "one two three four five six"])
def test_short_texts(text: str) -> None:
    words = len(text.replace(".", "").split())
    found = shingles(text, 5)
    assert found.size == (max(1, words - 4) if words else 0)
    keys = MinHash(4, 2, 5, 1).keys(found)
    assert (keys == [None] * 4) == (words == 0)


def mixed(value: int) -> int:
    return (value ^ (value >> 29)) * 0xBF58476D1CE4E5B9 % 2**64


@pytest.mark.parametrize(
    "text",
    ["", "a", "One two_three  4!", "x" * 300, "Stra\u00dfe \u00c9t\u00e9, na\u00efve \u6f22\u5b57 ab\u200bcd", "end9"],
)
def test_hashes_against_a_plain_loop(text: str) -> None:
    words = []
    for word in WORD.findall(text.lower()):
        value = 0xCBF29CE484222325
        for byte in word.encode():
            value = (value ^ byte) * 0x100000001B3 % 2**64
        words.append(mixed(value))
    assert word_hashes(text).tolist() == words
    expected = set()
    for first in range(max(1, len(words) - 2) if words else 0):
        value = words[first]
        for word in words[first + 1 : first + 3]:
            value = (mixed(value) + word) % 2**64
        expected.add(mixed(value))
    assert shingles(text, 3).tolist() == sorted(expected)


def test_signature_against_a_plain_loop() -> None:
    found = shingles("to be or not to be that is the question " * 2, 2)
    factors, offsets = (numbers.tolist() for numbers in _functions(12, 7))
    expected = [
        min((value * a + b) % 2**64 for value in found.tolist()) >> 32 for a, b in zip(factors, offsets, strict=True)
    ]
    assert signature(found, 12, 7).tolist() == expected


def test_equal_values_of_a_signature_estimate_the_similarity() -> None:
    draw = np.random.default_rng(0)
    pool = draw.integers(0, 2**64, 3000, dtype=np.uint64)
    one, two = pool[:2000], pool[1000:]
    equal = np.mean(signature(one, 2000, 3) == signature(two, 2000, 3))
    assert equal == pytest.approx(1 / 3, abs=0.04)


def test_pairs_of_equal_keys() -> None:
    numbers = np.array([3, 5, 8, 9, 12])
    keys = np.array([7, 1, 7, 7, 2], dtype=np.uint64)
    assert _neighbours(numbers, keys).tolist() == [[3, 8], [3, 9], [8, 9]]
    assert _neighbours(numbers[:0], keys[:0]).shape == (0, 2)


def test_proposed_pairs_are_made_distinct_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(3)
    proposed = [draw.integers(0, 40, (count, 2)) for count in (0, 30, 1, 400, 7)]
    expected = np.unique(np.concatenate(proposed), axis=0)
    for most in (1, 50, 10_000):
        monkeypatch.setattr(near, "GATHERED", most)
        assert np.array_equal(near.distinct_pairs(iter(proposed)), expected)
    large = np.array([[0, 2**32 - 1], [2**32 - 2, 2**32 - 1]])
    assert np.array_equal(near.distinct_pairs([large, large]), large)
    assert near.distinct_pairs([]).shape == (0, 2)
