"""Document vectors on disk: unit length (or zero), one file a curated part."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

OPEN = 128  # mapped files at once, each with a descriptor: a corpus has more parts than a process may have
Floats = npt.NDArray[np.float32]


def vectors_name(index: int) -> str:
    """The vectors of one curated part."""
    return f"vectors-{index:05d}.npy"


def load_vectors(folder: str | Path, parts: list[dict[str, Any]], first: int = 0, last: int | None = None) -> Floats:
    """Vectors of the documents ``first:last`` in document order: float32 ``[documents, dims]``, in memory."""
    pieces, start = [], 0
    for part in parts:
        stop = start + part["documents"]
        if first < stop and (last is None or last > start):
            rows = np.load(Path(folder) / part["file"], mmap_mode="r")
            pieces.append(rows[max(first - start, 0) : None if last is None else last - start])
        start = stop
    return np.concatenate(pieces)


class Vectors:
    """Vectors of any documents by number, through memory maps."""

    def __init__(self, folder: str | Path, parts: list[dict[str, Any]]) -> None:
        files = [Path(folder) / part["file"] for part in parts]
        self._map = lru_cache(OPEN)(lambda number: np.load(files[number], mmap_mode="r"))
        self.starts = np.cumsum([0, *(part["documents"] for part in parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __call__(self, documents: npt.NDArray[Any]) -> Floats:
        """Float32 ``[len(documents), dims]``."""
        rows = np.empty((len(documents), self._map(0).shape[1]), dtype=np.float32)
        numbers = np.searchsorted(self.starts, documents, side="right") - 1
        for number in np.unique(numbers):
            here = numbers == number
            rows[here] = self._map(int(number))[documents[here] - self.starts[number]]
        return rows
