"""Cut the visible part of an attention block into tiles for a kernel that knows "everything", "causal from the top-left
corner" and "by a mask tensor".

Causal masks and packed documents then cost no mask tensor and no work on what is masked; only the lower edge of a
sliding window and runs of very short documents are computed under a mask, in tiles of few rows.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
Kind = Literal["full", "causal", "masked"]

MASKED_ROWS = 128  # the most queries of a tile with a mask tensor
MASKED_KEYS = 512  # and the most keys, where short runs of queries share one
SHORT_RUN = 32  # queries; a kernel call for fewer costs more than its arithmetic


class Tile(NamedTuple):
    """Queries ``[q0, q1)`` against keys ``[k0, k1)`` of the batch rows ``[b0, b1)``; ``b1 == -1`` is the batch's end.

    A ``causal`` tile is square and query ``q0 + i`` sees the keys up to ``k0 + i``; in a ``full`` one every query sees
    every key; a ``masked`` one is cut by the ranges. Each query of a tile sees at least one of its keys, so no fully
    masked row ever reaches a kernel.
    """

    b0: int
    b1: int
    q0: int
    q1: int
    k0: int
    k1: int
    kind: Kind


class _Run(NamedTuple):
    """Queries ``[q0, q1)``, each of which sees something; from one to the next the range's ends move by ``growth``."""

    q0: int
    q1: int
    growth: tuple[int, int]


def _runs(start: IntArray, stop: IntArray) -> Iterator[_Run]:
    """Maximal runs of queries whose range grows evenly, by 0 or 1 key at either end."""
    count = len(start)
    seen = stop > start
    low, high = np.diff(start), np.diff(stop)
    even = seen[:-1] & seen[1:] & (low >= 0) & (low <= 1) & (high >= 0) & (high <= 1)
    code = np.where(even, 2 * low + high, -1)
    changes = [*(np.flatnonzero(np.diff(code)) + 1).tolist(), count - 1]
    following = iter(changes)
    end = next(following)
    row = 0
    while row < count:
        if not seen[row]:
            row += 1
            continue
        while end <= row and end < count - 1:
            end = next(following)
        last = row if row == count - 1 or code[row] < 0 else end
        if last - row == 1 and last < count - 1:
            last = row  # the second query rather belongs to the run that it begins
        yield _Run(row, last + 1, (int(low[row]), int(high[row])) if last > row else (0, 0))
        row = last + 1


def _gathered(runs: Iterator[_Run], start: IntArray, stop: IntArray) -> Iterator[_Run]:
    """Neighbouring short runs as one, with growth (1, 1), as long as the mask tensor for them stays small."""
    group: _Run | None = None
    for run in runs:
        short = run.q1 - run.q0 < SHORT_RUN
        if group is not None:
            keys = stop[run.q1 - 1] - start[group.q0]
            if short and run.q0 == group.q1 and run.q1 - group.q0 <= MASKED_ROWS and keys <= MASKED_KEYS:
                group = _Run(group.q0, run.q1, (1, 1))
                continue
            yield group
        group = run if short else None
        if not short:
            yield run
    if group is not None:
        yield group


def _run_tiles(run: _Run, start: IntArray, stop: IntArray) -> Iterator[tuple[int, int, int, int, Kind]]:
    q0, q1, (low, high) = run
    if low == 1 and q1 - q0 > MASKED_ROWS:
        for row in range(q0, q1, MASKED_ROWS):
            yield from _run_tiles(_Run(row, min(row + MASKED_ROWS, q1), run.growth), start, stop)
        return
    k0, k1 = int(start[q0]), int(stop[q0])
    if low == 1:
        shared = int(start[q1 - 1])  # from here to k1 every query sees every key
        if k1 - shared <= MASKED_KEYS:
            yield q0, q1, k0, int(stop[q1 - 1]), "masked"
            return
        yield q0, q1, k0, shared + 1, "masked"
        k0 = shared + 1
    if high == 0:
        yield q0, q1, k0, k1, "full"
        return
    if k1 - 1 > k0:
        yield q0, q1, k0, k1 - 1, "full"
    yield q0, q1, k1 - 1, k1 - 1 + q1 - q0, "causal"


def interval_tiles(start: IntArray, stop: IntArray) -> tuple[Tile, ...]:
    """All tiles of a block whose query ``i`` sees the keys ``[start[b, i], stop[b, i])``; both ``[batch or 1, Sq]``.

    From one query to the next neither end falls. Tiles of the same queries follow each other.
    """
    if start.shape[1] == 0:
        return ()
    tiles: list[Tile] = []
    for b, (low, high) in enumerate(zip(start, stop, strict=True)):
        rows = (b, b + 1) if len(start) > 1 else (0, -1)
        for run in _gathered(_runs(low, high), low, high):
            tiles += [Tile(*rows, *tile) for tile in _run_tiles(run, low, high)]
    return tuple(tiles)
