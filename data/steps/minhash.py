"""MinHash band keys of word shingles (Broder 1997); data/near.py finds the near duplicates over the whole corpus.

A text's words are its lower-case letters and digits, its shingles every ``shingle`` words in a row (a shorter text is
one shingle). A word's hash is FNV-1a of its UTF-8 bytes, mixed; the ``bands * rows`` hash functions are multiply-shift
(Dietzfelbinger et al. 1997) on 64 mixed bits. Two texts of Jaccard similarity s share at least one band key with
probability 1 - (1 - s^rows)^bands.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numba
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from conf.curate import CurationConfig
from data.annotators import Annotator, Documents
from data.steps.kind import Verdicts

REASONS: tuple[str, ...] = ()
EDITS = ""
WORD = re.compile(r"\w+")
Bits = npt.NDArray[np.uint64]
MULTIPLIER, SHIFT = np.uint64(0xBF58476D1CE4E5B9), np.uint64(29)
FNV_START, FNV_PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)
IN_ASCII = np.array([bool(WORD.match(chr(byte))) if byte < 128 else False for byte in range(256)])
NOT_SPACE = np.arange(256) != ord(" ")


def word_hashes(text: str) -> Bits:
    """A hash of every word of the text, in order."""
    lower = text.lower()
    if lower.isascii():
        return _word_hashes(np.frombuffer(lower.encode(), np.uint8), IN_ASCII)
    return _word_hashes(np.frombuffer(" ".join(WORD.findall(lower)).encode(), np.uint8), NOT_SPACE)


@numba.njit(cache=True)
def _word_hashes(content: npt.NDArray[np.uint8], inside: npt.NDArray[np.bool_]) -> Bits:
    """Hashes of the runs of bytes that are ``inside``."""
    found, count, value, running = np.empty(len(content) // 2 + 1, dtype=np.uint64), 0, FNV_START, False
    for byte in content:
        if inside[byte]:
            value, running = (value ^ np.uint64(byte)) * FNV_PRIME, True
        elif running:
            found[count] = (value ^ (value >> SHIFT)) * MULTIPLIER
            count, value, running = count + 1, FNV_START, False
    if running:
        found[count] = (value ^ (value >> SHIFT)) * MULTIPLIER
        count += 1
    return found[:count]


@numba.njit(cache=True)
def _windows(words: Bits, size: int) -> Bits:
    """Hashes of ``size`` words in a row."""
    size = min(size, len(words))
    found = np.empty(len(words) - size + 1 if size else 0, dtype=np.uint64)
    for first in range(len(found)):
        value = words[first]
        for place in range(first + 1, first + size):
            value = (value ^ (value >> SHIFT)) * MULTIPLIER + words[place]
        found[first] = (value ^ (value >> SHIFT)) * MULTIPLIER
    return found


def shingles(text: str, size: int) -> Bits:
    """The sorted, distinct hashes of a text's shingles."""
    return np.unique(_windows(word_hashes(text), size))


@functools.lru_cache(maxsize=4)
def _functions(count: int, seed: int) -> tuple[Bits, Bits]:
    """Odd multipliers and offsets of the hash functions, ``[count]``."""
    draw = np.random.Generator(np.random.PCG64(seed))
    numbers = draw.integers(0, 2**64, size=(2, count), dtype=np.uint64)
    return numbers[0] | np.uint64(1), numbers[1]


def signature(found: Bits, count: int, seed: int) -> npt.NDArray[np.uint32]:
    """The least value of each hash function over the shingles: ``[count]``."""
    return _signature(found, *_functions(count, seed))


@numba.njit(cache=True)
def _signature(found: Bits, factors: Bits, offsets: Bits) -> npt.NDArray[np.uint32]:
    least = np.full(len(factors), 0xFFFFFFFF, dtype=np.uint32)
    for value in found:
        for row in range(len(factors)):
            hashed = np.uint32((value * factors[row] + offsets[row]) >> np.uint64(32))
            least[row] = min(least[row], hashed)
    return least


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
    VERSION: ClassVar[int] = 2

    @property
    def SCHEMA(self) -> pa.Schema:  # pyright: ignore[reportIncompatibleVariableOverride] - here of the settings
        return pa.schema([(name, pa.uint64()) for name in band_names(self.bands)])

    def columns(self, documents: Documents) -> dict[str, Any]:
        keys = [self.keys(_windows(word_hashes(text), self.shingle)) for text in documents.texts]
        columns = zip(*keys, strict=True) if keys else ([] for _ in range(self.bands))
        return dict(zip(band_names(self.bands), map(list, columns), strict=True))

    def keys(self, found: Bits) -> Sequence[int | None]:
        """The band keys of shingles; order and repeats change nothing."""
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
