"""Attention masks from their definition, one query-key pair at a time in spirit: the oracle of the interval form."""

import numpy as np

from fused.mask import Mask


def dense_mask(rule: Mask, length: int, documents: np.ndarray | None = None) -> np.ndarray:
    """Booleans ``[batch or 1, length, length]``, True where a query sees a key; documents are runs of equal ids."""
    query, key = np.arange(length)[:, None], np.arange(length)[None, :]
    near = np.ones((length, length), dtype=bool)
    if rule.left is not None:
        near &= key >= query - rule.left
    if documents is None:
        ahead = np.ones_like(near) if rule.right is None else (key <= query + rule.right) | (key < rule.prefix)
        return (near & ahead)[None]
    rows: list[np.ndarray] = []
    for ids in documents:
        run = np.concatenate([[0], np.cumsum(ids[1:] != ids[:-1])])
        first = np.searchsorted(run, run)
        ahead = np.ones_like(near)
        if rule.right is not None:
            ahead = (key <= query + rule.right) | (key < first[:, None] + rule.prefix)
        rows.append(near & ahead & (run[:, None] == run[None, :]))
    return np.stack(rows)
