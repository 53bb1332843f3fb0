"""The repetition rules of Gopher (Rae et al. 2021, arXiv 2112.11446, table A1), as datatrove computes them.

Shares of a text's characters: a duplicate n-gram counts from its second appearance, without spaces, and the search
goes on behind it; the most frequent n-gram counts with its spaces, the first one of equally frequent ones.
"""

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from conf.curate import CurationConfig
from data.annotators import Annotator, Documents
from data.steps.kind import Verdicts, column
from data.steps.words import Words, split_words

TOP, DUPLICATE = (2, 3, 4), (5, 6, 7, 8, 9, 10)
REASONS = (
    "duplicate_paragraphs",
    "duplicate_paragraph_chars",
    "duplicate_lines",
    "duplicate_line_chars",
    *(f"top_{n}_gram" for n in TOP),
    *(f"duplicate_{n}_grams" for n in DUPLICATE),
)
EDITS = ""
PARAGRAPH, LINE = re.compile(r"\n{2,}"), re.compile(r"\n+")
Array = npt.NDArray[Any]


def duplicates(pieces: list[str]) -> tuple[int, int]:
    """How many pieces repeat an earlier one, and their characters."""
    first = set(pieces)
    if len(first) == len(pieces):
        return 0, 0
    return len(pieces) - len(first), sum(map(len, pieces)) - sum(map(len, first))


def _mix(numbers: Array) -> npt.NDArray[np.uint64]:
    """Numbers to 64 random-looking bits (the finaliser of SplitMix64)."""
    bits = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


class NGrams:
    """n-grams of a batch of texts, n growing: of longer ones only those are looked at whose parts repeat."""

    def __init__(self, words: Words) -> None:
        sizes = np.diff(words.offsets)
        self.text = np.repeat(np.arange(len(sizes)), sizes)  # of each word
        self.ends = np.repeat(words.offsets[1:], sizes)
        self.chars = np.concatenate([[0], np.cumsum(words.lengths[words.numbers])])  # before each word
        self.starts = words.offsets[:-1]
        self.sizes = sizes
        self.word_bits = _mix(words.numbers)
        self.hashes = self.word_bits ^ _mix(self.text + 2**32)  # of the n-gram at each word, its text among them
        self.repeats = np.ones(len(self.hashes), dtype=bool)  # whether the n-gram at a word repeats in its text
        self.n = 1

    def grow(self) -> tuple[Array, Array, Array]:
        """n-grams one word longer that repeat: their words in order, a number of each n-gram, how often it is there."""
        self.n += 1
        places = np.flatnonzero(self.repeats[:-1] & self.repeats[1:])
        places = places[places + self.n <= self.ends[places]]
        self.hashes[places] = self.hashes[places] * np.uint64(0x100000001B3) + self.word_bits[places + self.n - 1]
        _, group, count = np.unique(self.hashes[places], return_inverse=True, return_counts=True)
        again = count[group] > 1
        self.repeats = np.zeros(len(self.hashes), dtype=bool)
        self.repeats[places[again]] = True
        return places[again], group[again], count[group[again]]

    def top(self, places: Array, group: Array, count: Array) -> Array:
        """Characters of the most frequent n-gram of each text, times its frequency."""
        n = self.n
        found = np.zeros(len(self.sizes), dtype=np.int64)
        some = self.sizes >= n  # one that stands alone is the first of the text
        begin = self.starts[some]
        found[some] = self.chars[begin + n] - self.chars[begin] + n - 1
        order = np.lexsort((places, -count, self.text[places]))
        texts, first = np.unique(self.text[places][order], return_index=True)
        best = places[order][first]
        found[texts] = (self.chars[best + n] - self.chars[best] + n - 1) * count[order][first]
        return found

    def duplicate(self, places: Array, group: Array) -> Array:
        """Characters of the n-grams of each text that stood there before; those found do not overlap."""
        found = np.zeros(len(self.sizes), dtype=np.int64)
        seen: set[int] = set()
        next_place, hits = 0, []
        for place, number in zip(places.tolist(), group.tolist(), strict=True):
            if place < next_place:
                continue
            if number in seen:
                hits.append(place)
                next_place = place + self.n
            else:
                seen.add(number)
        if hits:
            at = np.array(hits)
            np.add.at(found, self.text[at], self.chars[at + self.n] - self.chars[at])
        return found


@dataclass(frozen=True)
class Repetition(Annotator):
    """Shares of repeated paragraphs, lines and n-grams."""

    NAME: ClassVar[str] = "repetition"
    VERSION: ClassVar[int] = 1
    SCHEMA: ClassVar[pa.Schema] = pa.schema([(name, pa.float64()) for name in REASONS])

    def columns(self, documents: Documents) -> dict[str, Any]:
        texts = documents.texts
        found: dict[str, Any] = {name: [] for name in REASONS[:4]}
        for text in texts:
            for kind, pieces in (("paragraph", PARAGRAPH.split(text.strip())), ("line", LINE.split(text))):
                many, chars = duplicates(pieces)
                found[f"duplicate_{kind}s"].append(many / len(pieces))
                found[f"duplicate_{kind}_chars"].append(chars / max(1, len(text)))
        sizes = np.maximum(1, [len(text) for text in texts])
        grams = NGrams(documents.view(split_words))
        for n in range(2, DUPLICATE[-1] + 1):
            places, group, count = grams.grow()
            if n in TOP:
                found[f"top_{n}_gram"] = grams.top(places, group, count) / sizes
            else:
                found[f"duplicate_{n}_grams"] = grams.duplicate(places, group) / sizes
        return found


def annotator(config: CurationConfig) -> Annotator | None:
    return Repetition() if config.repetition.enabled else None


def reasons(columns: pa.Table, config: CurationConfig) -> Verdicts:
    limits = config.repetition
    shares = [
        limits.max_duplicate_paragraphs,
        limits.max_duplicate_paragraph_chars,
        limits.max_duplicate_lines,
        limits.max_duplicate_line_chars,
    ]
    for name, limit in zip(REASONS, [*shares, *limits.max_top_ngrams, *limits.max_duplicate_ngrams], strict=True):
        yield name, (limit > 0) & (column(columns, name) > limit)
