"""How related neighbours in an order are: figures from the order and the vectors alone."""

import numpy as np
import numpy.typing as npt

from data.permutation import permute

RANDOM_KEY = 0xC0FFEE  # of the random order that figures are compared with
BLOCK = 65536  # rows at once
Ints = npt.NDArray[np.int64]


def random_order(documents: int) -> Ints:
    """A fixed pseudo-random order of the documents."""
    return permute(np.arange(documents), documents, RANDOM_KEY) if documents else np.zeros(0, dtype=np.int64)


def adjacent_similarity(vectors: npt.NDArray[np.float32], order: Ints) -> float:
    """Mean cosine of consecutive documents; 0 for fewer than two. ``vectors`` have unit length."""
    if len(order) < 2:
        return 0.0
    total = 0.0
    for start in range(0, len(order) - 1, BLOCK):
        rows = vectors[order[start : start + BLOCK + 1]].astype(np.float64)
        total += float(np.einsum("nd,nd->", rows[:-1], rows[1:]))
    return total / (len(order) - 1)


def jumps(neighbours: Ints, order: Ints) -> int:
    """Consecutive documents of which neither is among the other's neighbours."""
    before, after = order[:-1], order[1:]
    joined = (neighbours[before] == after[:, None]).any(axis=1) | (neighbours[after] == before[:, None]).any(axis=1)
    return int(np.count_nonzero(~joined))
