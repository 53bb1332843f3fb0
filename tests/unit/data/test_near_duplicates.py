"""Near duplicates: verified by words, not by likeness of vectors."""

import itertools

import numpy as np
import pytest

from data.near_duplicates import ROUNDS, SHINGLE, jaccard, redundant, redundant_in_components, sketch


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


@pytest.mark.parametrize("texts", [1, 3, ROUNDS + 8])
def test_one_of_many_copies_stays_though_each_knows_only_some(texts: int) -> None:
    """Copies of different texts in one component, each text's in a ring: the longest of each text stays."""
    rng = np.random.default_rng(texts)
    different = np.stack([sketch(" ".join(words(rng, 300))) for _ in range(texts)])
    kind = np.repeat(np.arange(texts), 200)
    ring = np.arange(len(kind)).reshape(texts, 200)
    pairs = np.concatenate(
        [np.stack([ring, np.roll(ring, -step, axis=1)], axis=2).reshape(-1, 2) for step in (1, 2, 3)]
    )
    lengths = rng.integers(1, 9, len(kind))
    bridges = np.stack([ring[:-1, 0], ring[1:, 0]], axis=1)
    gone = redundant_in_components(different[kind], np.concatenate([pairs, bridges]), lengths, 0.8)
    kept = np.setdiff1d(np.arange(len(kind)), gone)
    best = [int(row[np.lexsort((row, -lengths[row]))[0]]) for row in ring]
    if texts <= ROUNDS:
        assert kept.tolist() == best
    else:  # later ones by their pairs alone
        assert {*kind[kept].tolist()} == {*range(texts)}
        assert len(kept) < 60 * texts


@pytest.mark.parametrize("seed", range(10))
def test_who_goes_against_a_plain_loop_over_whole_components(seed: int) -> None:
    draw = np.random.default_rng(seed)
    base = words(draw, 60)
    texts = [" ".join(base[: 60 - cut] + words(draw, cut)) for cut in draw.integers(0, 40, 30)]
    sketches, lengths = np.stack([sketch(text) for text in texts]), draw.integers(1, 6, 30)
    pairs = np.array(list(itertools.combinations(range(30), 2)))
    verified = pairs[jaccard(sketches, pairs) >= 0.6]
    verified = verified[draw.random(len(verified)) < 0.5]
    near = {tuple(pair) for pair in pairs[jaccard(sketches, pairs) >= 0.6].tolist()}
    component = list(range(30))
    for _ in range(30):
        for a, b in verified.tolist():
            component[a] = component[b] = min(component[a], component[b])
    kept: list[int] = []
    for row in sorted(range(30), key=lambda row: (-int(lengths[row]), row)):
        if not any(component[row] == component[k] and (min(row, k), max(row, k)) in near for k in kept):
            kept.append(row)
    gone = redundant_in_components(sketches, verified, lengths, 0.6)
    assert gone.tolist() == sorted({*range(30)} - {*kept})
