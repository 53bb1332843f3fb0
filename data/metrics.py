"""How related the documents of an order and of packed windows are: from the plan and vectors alone.

Windows are given as two equally long arrays, sorted by window: ``documents`` (numbers) and ``windows``; a document that
is cut lies in several. Judge by vectors other than those that made the order, else the figures praise themselves.
"""

import itertools
import lzma
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

BLOCK = 8192  # rows at once
Array = npt.NDArray[np.number]
Ints = npt.NDArray[np.int64]
Rows = Callable[[Ints], npt.NDArray[np.float32]]  # unit vectors of documents by number


def adjacent_similarity(vectors: Rows, order: Ints) -> float:
    """Mean cosine of consecutive documents; 0 for fewer than two."""
    if len(order) < 2:
        return 0.0
    total = 0.0
    for start in range(0, len(order) - 1, BLOCK):
        rows = vectors(order[start : start + BLOCK + 1]).astype(np.float64)
        total += float(np.einsum("nd,nd->", rows[:-1], rows[1:]))
    return total / (len(order) - 1)


def jumps(neighbours: Array, order: Ints) -> npt.NDArray[np.bool_]:
    """Whether consecutive documents are jumped between, bool ``[documents - 1]``: neither is the other's neighbour."""
    broken = np.empty(max(len(order) - 1, 0), dtype=bool)
    for start in range(0, len(broken), BLOCK):
        before, after = order[:-1][start : start + BLOCK], order[1:][start : start + BLOCK]
        joined = (neighbours[before] == after[:, None]).any(axis=1) | (neighbours[after] == before[:, None]).any(axis=1)
        broken[start : start + BLOCK] = ~joined
    return broken


def pair_similarity(vectors: Rows, documents: Ints, windows: Ints) -> float:
    """Mean over windows of the mean cosine between two of its documents; windows of one document are left out."""
    means = []
    bounds = _bounds(windows)
    for first, last in itertools.pairwise(bounds.tolist()):
        count = last - first
        if count > 1:
            rows = vectors(documents[first:last]).astype(np.float64)
            total = rows.sum(axis=0)
            means.append((total @ total - np.einsum("nd,nd->", rows, rows)) / (count * (count - 1)))
    return float(np.mean(means)) if means else 0.0


def neighbour_share(neighbours: Array, documents: Ints, windows: Ints) -> tuple[float, float]:
    """Share of documents with one of their own nearest in their window, and of windows where every document has one."""
    if not len(documents):
        return 0.0, 0.0
    width = int(windows.max()) + 1
    keys = np.sort(documents.astype(np.int64) * width + windows)
    has = np.zeros(len(documents), dtype=bool)
    for column in range(neighbours.shape[1]):
        targets = neighbours[documents, column].astype(np.int64)
        wanted = targets * width + windows
        place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        has |= (keys[place] == wanted) & (targets >= 0) & (targets != documents)
    missing = np.add.reduceat(~has, _bounds(windows)[:-1])
    return float(has.mean()), float((missing == 0).mean())


def compression_gain(windows: Sequence[Sequence[str]]) -> float:
    """1 - bytes of windows compressed as a whole / bytes of their documents compressed one by one (LZMA).

    What documents of a window say about each other, by no embedding at all.
    """
    joint = sum(_compressed("".join(texts)) for texts in windows)
    apart = sum(_compressed(text) for texts in windows for text in texts)
    return 1 - joint / apart if apart else 0.0


def _compressed(text: str) -> int:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
    return len(lzma.compress(text.encode(), format=lzma.FORMAT_RAW, filters=filters))


def _bounds(windows: Ints) -> Ints:
    """Where each window's rows begin, and the end."""
    return np.concatenate([[0], np.flatnonzero(np.diff(windows)) + 1, [len(windows)]])
