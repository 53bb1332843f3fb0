"""Exact duplicates by a hash of the normalised text; of equal documents the first in corpus order stays."""

import hashlib
import unicodedata

import numpy as np
import numpy.typing as npt

HASH_BYTES = 16  # two different texts of a billion share a hash with probability 1e-21


def normalise(text: str) -> str:
    """The text without regard to Unicode composition, case and white space."""
    composed = text if text.isascii() else unicodedata.normalize("NFC", text)
    return " ".join(composed.casefold().split())


def text_hash(text: str) -> bytes:
    """HASH_BYTES bytes, equal for texts that are equal after ``normalise``."""
    return hashlib.blake2b(normalise(text).encode(), digest_size=HASH_BYTES).digest()


def id_hash(name: str) -> bytes:
    """HASH_BYTES bytes of a document's id."""
    return hashlib.blake2b(name.encode(), digest_size=HASH_BYTES).digest()


def repeats(hashes: npt.NDArray[np.uint64], candidates: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Which rows repeat an earlier row; ``hashes`` is ``[rows, 2]`` and only rows in ``candidates`` are looked at."""
    rows = np.flatnonzero(candidates)
    high, low = hashes[rows, 0], hashes[rows, 1]
    order = np.lexsort((rows, low, high))
    again = np.zeros(rows.size, dtype=bool)
    again[1:] = (high[order][1:] == high[order][:-1]) & (low[order][1:] == low[order][:-1])
    found = np.zeros(len(hashes), dtype=bool)
    found[rows[order[again]]] = True
    return found
