"""A fixed pseudo-random order: the baseline of ordinary packing."""

import numpy as np

from data.orders.graph import Array
from data.permutation import permute

KEY = 0xC0FFEE


def order(documents: int) -> Array:
    """A permutation of the documents, int64 ``[documents]``."""
    return permute(np.arange(documents), documents, KEY) if documents else np.zeros(0, dtype=np.int64)
