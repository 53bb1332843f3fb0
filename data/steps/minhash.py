"""MinHash band keys of word shingles (Broder 1997); data/near.py finds the near duplicates over the whole corpus.

A text's words are its lower-case letters and digits, its shingles every ``shingle`` words in a row (a shorter text is
one shingle). The ``bands * rows`` hash functions are multiply-shift (Dietzfelbinger et al. 1997) on 64 mixed bits; two
texts of Jaccard similarity s share at least one band key with probability 1 - (1 - s^rows)^bands.
"""

import functools
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from conf.curate import CurationConfig
from data.annotators import Annotator, Documents
from data.steps.kind import Verdicts

REASONS: tuple[str, ...] = ()
EDITS = ""
WORD = re.compile(r"\w+")
MAX_CHUNKS = 1_000_000  # chunks remembered between batches
TILE = 256  # shingles hashed at once: bands * rows * TILE numbers stay in the cache
Bits = npt.NDArray[np.uint64]
MULTIPLIER, SHIFT = np.uint64(0xBF58476D1CE4E5B9), np.uint64(29)


class Chunks(dict[str, bytes]):
    """Hashes of the words of each chunk seen, 8 bytes a word, the same in every process."""

    def __missing__(self, chunk: str) -> bytes:
        words = WORD.findall(chunk.lower())
        found = self[chunk] = b"".join(hashlib.blake2b(word.encode(), digest_size=8).digest() for word in words)
        return found


CHUNKS = Chunks()


def shingles(text: str, size: int) -> Bits:
    """The sorted, distinct hashes of a text's shingles."""
    if len(CHUNKS) > MAX_CHUNKS:
        CHUNKS.clear()
    words = np.frombuffer(b"".join(map(CHUNKS.__getitem__, text.split())), dtype=np.uint64)
    if not words.size:
        return words
    windows = max(1, words.size - size + 1)
    mixed = words[:windows].copy()
    for offset in range(1, min(size, words.size)):
        mixed = (mixed ^ (mixed >> SHIFT)) * MULTIPLIER + words[offset : offset + windows]
    return np.unique((mixed ^ (mixed >> SHIFT)) * MULTIPLIER)


@functools.lru_cache(maxsize=4)
def _functions(count: int, seed: int) -> tuple[Bits, Bits]:
    """Odd multipliers and offsets of the hash functions, ``[count, 1]``."""
    draw = np.random.Generator(np.random.PCG64(seed))
    numbers = draw.integers(0, 2**64, size=(2, count, 1), dtype=np.uint64)
    return numbers[0] | np.uint64(1), numbers[1]


def signature(found: Bits, count: int, seed: int) -> npt.NDArray[np.uint32]:
    """The least value of each hash function over the shingles: ``[count]``."""
    factors, offsets = _functions(count, seed)
    least = np.full(count, np.iinfo(np.uint64).max, dtype=np.uint64)
    for first in range(0, found.size, TILE):
        np.minimum(least, (found[first : first + TILE] * factors + offsets).min(axis=1), out=least)
    return (least >> np.uint64(32)).astype(np.uint32)


def band_names(bands: int) -> list[str]:
    """Columns of the band keys."""
    return [f"band_{band:02d}" for band in range(bands)]


@dataclass(frozen=True)
class MinHash(Annotator):
    """A key for each band of each document; null for a text without words."""

    bands: int
    rows: int
    shingle: int
    seed: int
    NAME: ClassVar[str] = "minhash"
    VERSION: ClassVar[int] = 1

    @property
    def SCHEMA(self) -> pa.Schema:  # pyright: ignore[reportIncompatibleVariableOverride] - here of the settings
        return pa.schema([(name, pa.uint64()) for name in band_names(self.bands)])

    def columns(self, documents: Documents) -> dict[str, Any]:
        keys = [self.keys(shingles(text, self.shingle)) for text in documents.texts]
        columns = zip(*keys, strict=True) if keys else ([] for _ in range(self.bands))
        return dict(zip(band_names(self.bands), map(list, columns), strict=True))

    def keys(self, found: Bits) -> Sequence[int | None]:
        """The band keys of a set of shingles."""
        if not found.size:
            return [None] * self.bands
        rows = signature(found, self.bands * self.rows, self.seed).reshape(self.bands, self.rows)
        keys = np.full(self.bands, self.seed, dtype=np.uint64)
        for row in range(self.rows):
            keys = (keys ^ (keys >> SHIFT)) * MULTIPLIER + rows[:, row]
        return ((keys ^ (keys >> SHIFT)) * MULTIPLIER).tolist()


def annotator(config: CurationConfig) -> Annotator | None:
    minhash = config.minhash
    return MinHash(minhash.bands, minhash.rows, minhash.shingle, minhash.seed) if minhash.enabled else None


def reasons(columns: pa.Table, config: CurationConfig) -> Verdicts:
    del columns, config  # near duplicates are known when the whole corpus is
    yield from ()
