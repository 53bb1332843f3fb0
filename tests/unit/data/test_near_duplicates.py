"""Near duplicates: verified by words, not by likeness of vectors."""

import itertools

import numpy as np
import pytest

from data.near_duplicates import SHINGLE, jaccard, redundant, sketch


def words(rng: np.random.Generator, count: int) -> list[str]:
    return [f"w{i}" for i in rng.integers(0, 5000, count)]


def shingles(text: str) -> set[tuple[str, ...]]:
    return {*zip(*(text.split()[i:] for i in range(SHINGLE)), strict=False)}


def similarity(left: set[tuple[str, ...]], right: set[tuple[str, ...]]) -> float:
    return len(left & right) / len(left | right)


def planted(seed: int) -> list[str]:
    """Documents under two licence headers, some of them copied with a few words changed."""
    rng = np.random.default_rng(seed)
    headers = [words(rng, 120), words(rng, 40)]
    texts = []
    for number in range(150):
        body = words(rng, int(rng.integers(40, 900)))
        texts.append(" ".join(headers[number % 2] + body))
        if number % 3 == 0:
            for place in rng.integers(0, len(body), max(1, len(body) // int(rng.integers(20, 400)))):
                body[place] = "changed"
            texts.append(" ".join(headers[number % 2] + body))
    return texts


def test_precision_and_recall_on_a_planted_set() -> None:
    texts = planted(0)
    pairs = np.array(list(itertools.combinations(range(len(texts)), 2)))
    sets = [shingles(text) for text in texts]
    truth = np.array([similarity(sets[a], sets[b]) >= 0.8 for a, b in pairs])
    sketches = np.stack([sketch(text) for text in texts])
    found = jaccard(sketches, pairs) >= 0.8
    assert truth.sum() > 20
    assert (found & truth).sum() / found.sum() >= 0.95
    assert (found & truth).sum() / truth.sum() >= 0.95


def test_short_texts_are_exact() -> None:
    rng = np.random.default_rng(2)
    base = words(rng, 100)
    texts = [" ".join(base[:cut] + words(rng, 100 - cut)) for cut in range(0, 101, 10)]
    pairs = np.array(list(itertools.combinations(range(len(texts)), 2)))
    sketches = np.stack([sketch(text) for text in texts])
    found = jaccard(sketches, pairs)
    assert found == pytest.approx([similarity(shingles(texts[a]), shingles(texts[b])) for a, b in pairs])


def test_texts_without_five_words() -> None:
    rows = np.stack([sketch(text) for text in ("", "one two", "one two", "!!")])
    assert jaccard(rows, np.array([[1, 2], [0, 3], [0, 1]])).tolist() == [1.0, 1.0, 0.0]


def test_a_chain_does_not_pull_in_what_is_no_duplicate_of_the_kept() -> None:
    pairs = np.array([[0, 1], [1, 2], [2, 3]])
    assert redundant(pairs, np.array([40, 30, 20, 10])).tolist() == [1, 3]
    assert redundant(pairs, np.array([5, 5, 5, 5])).tolist() == [1, 3]
    assert redundant(np.zeros((0, 2), dtype=np.int64), np.array([1])).tolist() == []


@pytest.mark.parametrize("seed", range(20))
def test_who_goes_against_a_plain_loop(seed: int) -> None:
    draw = np.random.default_rng(seed)
    pairs, lengths = draw.integers(0, 30, (40, 2)), draw.integers(1, 6, 30)
    kept: set[int] = set()
    for row in sorted(range(30), key=lambda row: (-int(lengths[row]), row)):
        if not any({*pair} - {row} <= kept and row in pair and pair[0] != pair[1] for pair in pairs.tolist()):
            kept.add(row)
    assert redundant(pairs, lengths).tolist() == sorted({*range(30)} - kept)
