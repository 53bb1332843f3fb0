"""Cut the visible part of an attention block into rectangles and top-left triangles.

A fused kernel that knows only "everything" and "causal from the top-left corner" then computes causal masks and packed
documents exactly, with no mask tensor and no work on what is masked.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


class Tile(NamedTuple):
    """Queries ``[q0, q1)`` against keys ``[k0, k1)`` of the batch rows ``[b0, b1)``.

    A ``causal`` tile is square and query ``q0 + i`` sees the keys up to ``k0 + i``; in any other tile every query sees
    every key. So each query of a tile sees at least one key, and no fully masked row ever reaches a kernel.
    """

    b0: int
    b1: int
    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool


def staircase(query_positions: IntArray, key_positions: IntArray) -> list[tuple[int, int, int, int, bool]]:
    """Tiles ``(q0, q1, k0, k1, causal)`` of the mask ``key position <= query position``; both ascend.

    The number of visible keys never falls from one query to the next: where it stays there is a rectangle, where it
    grows by one a triangle (with a rectangle to its left), and a jump starts anew.
    """
    visible = np.searchsorted(key_positions, query_positions, side="right")
    count = len(visible)
    growth = np.diff(visible)
    changes = np.flatnonzero(np.diff(growth)) + 1  # a row here ends one run of constant growth and may begin the next
    tiles: list[tuple[int, int, int, int, bool]] = []
    row = int(np.searchsorted(visible, 1))
    while row < count:
        seen = int(visible[row])
        step = int(growth[row]) if row < count - 1 else 0
        last = row
        if step in (0, 1) and row < count - 1:
            following = np.searchsorted(changes, row, side="right")
            last = int(changes[following]) if following < len(changes) else count - 1
        if step == 1 and last > row:
            if seen > 1:
                tiles.append((row, last + 1, 0, seen - 1, False))
            tiles.append((row, last + 1, seen - 1, int(visible[last]), True))
        else:
            tiles.append((row, last + 1, 0, seen, False))
        row = last + 1
    return tiles


def _runs(documents: IntArray) -> list[tuple[int, int, int]]:
    """``(start, stop, document)`` of each maximal run of equal ids."""
    edges = [0, *(np.flatnonzero(np.diff(documents)) + 1).tolist(), len(documents)]
    return [(a, b, int(documents[a])) for a, b in pairwise(edges) if a < b]


def _document_tiles(
    query_positions: IntArray, key_positions: IntArray, causal: bool, queries: IntArray, keys: IntArray
) -> list[tuple[int, int, int, int, bool]]:
    """Tiles of one batch row: a query sees the keys that carry its document id."""
    by_document: dict[int, list[tuple[int, int]]] = {}
    for start, stop, document in _runs(keys):
        by_document.setdefault(document, []).append((start, stop))
    tiles: list[tuple[int, int, int, int, bool]] = []
    for q0, q1, document in _runs(queries):
        for k0, k1 in by_document.get(document, ()):
            if causal:
                inner = staircase(query_positions[q0:q1], key_positions[k0:k1])
                tiles += [(a + q0, b + q0, c + k0, d + k0, triangle) for a, b, c, d, triangle in inner]
            else:
                tiles.append((q0, q1, k0, k1, False))
    return tiles


def block_tiles(
    query_positions: IntArray,
    key_positions: IntArray,
    causal: bool,
    query_documents: IntArray | None = None,
    key_documents: IntArray | None = None,
) -> tuple[Tile, ...]:
    """All tiles of a block. Positions ``[Sq]`` and ``[Sk]`` ascend; documents are ``[batch, Sq]`` and ``[batch, Sk]``.

    Without documents the tiles span the whole batch (``b1 == -1`` stands for its end).
    """
    if len(query_positions) == 0 or len(key_positions) == 0:
        return ()
    if query_documents is None or key_documents is None:
        plain = staircase(query_positions, key_positions) if causal else None
        if plain is None:
            plain = [(0, len(query_positions), 0, len(key_positions), False)]
        return tuple(Tile(0, -1, *tile) for tile in plain)
    rows: list[Tile] = []
    for b, (queries, keys) in enumerate(zip(query_documents, key_documents, strict=True)):
        tiles = _document_tiles(query_positions, key_positions, causal, queries, keys)
        rows += [Tile(b, b + 1, *tile) for tile in tiles]
    return tuple(rows)
