"""Rows with the same vector, or nearly so: found by hashes in one pass, so that an index holds each of them once."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data.shards import write_array

MISSING = -1  # id where a document has fewer than k neighbours
GRAIN = 1024  # vectors that agree to 1 / GRAIN in every dimension are one: their cosine is 1 - dims / 2^21 at least
ROWS = 16_384  # vectors at once
Floats = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.int32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Groups:
    """Who shares a vector; int32, in memory or mapped."""

    first: Numbers  # [groups]: the first row of each, ascending
    group: Numbers  # [rows]
    members: Numbers  # [rows]: the rows group by group, ascending in each
    bounds: Numbers  # [groups + 1]: of each group among the members
    place: Numbers  # [rows]: of each row in its group

    def mates(self, own: Ints, k: int) -> Ints:
        """Up to ``k`` rows with the same vector, those that follow in the group, round its end; else -1."""
        group, steps = self.group[own], np.arange(1, k + 1)[None]
        begin, end = self.bounds[group][:, None], self.bounds[group + 1][:, None]
        size = end - begin
        return np.where(steps < size, self.members[begin + (self.place[own][:, None] + steps) % size], MISSING)


def group_rows(rows: int, vectors: Callable[[int, int], Floats]) -> Groups:
    """The groups of all rows; ``vectors(first, last)`` gives some. About 60 bytes a row are in memory."""
    if not rows:
        return Groups(*(np.zeros(size, dtype=np.int32) for size in (0, 0, 0, 1, 0)))
    keys = np.empty((2, rows), dtype=np.uint64)
    for start in range(0, rows, ROWS):
        last = min(start + ROWS, rows)
        keys[:, start:last] = _keys(vectors(start, last))
    order = np.lexsort(keys)  # stable: rows of a group ascend
    fresh = np.ones(rows, dtype=bool)
    fresh[1:] = False
    for key in keys:
        fresh[1:] |= np.diff(key[order]) != 0
    del keys
    bounds = np.append(np.flatnonzero(fresh), rows)
    rank = np.argsort(order[bounds[:-1]])  # groups by their first rows
    sizes = np.diff(bounds)[rank]
    ends = np.cumsum(sizes)
    within = np.arange(rows, dtype=np.int32) - np.repeat(ends - sizes, sizes).astype(np.int32)
    members = order[np.repeat(bounds[:-1][rank], sizes) + within].astype(np.int32)
    group, place = np.empty(rows, dtype=np.int32), np.empty(rows, dtype=np.int32)
    group[members], place[members] = np.repeat(np.arange(len(rank), dtype=np.int32), sizes), within
    starts = np.concatenate([[0], ends]).astype(np.int32)
    return Groups(members[starts[:-1]], group, members, starts, place)


def _keys(vectors: Floats) -> npt.NDArray[np.uint64]:
    """Two 64-bit sums of products, mod 2^64, of each row rounded to 1 / GRAIN."""
    odd = np.random.default_rng(0).integers(1, 2**63, (2, vectors.shape[1]), dtype=np.uint64)
    odd = odd * np.uint64(2) + np.uint64(1)
    return odd @ np.rint(vectors * GRAIN).astype(np.int64).view(np.uint64).T


def group_names() -> list[str]:
    """Files of the groups of all rows."""
    return [f"groups-{field.name}.npy" for field in fields(Groups)]


def write_groups(folder: Path, groups: Groups) -> None:
    """Writes the files."""
    for name, field in zip(group_names(), fields(Groups), strict=True):
        array: npt.NDArray[Any] = getattr(groups, field.name)
        write_array(folder / name, array)


def map_groups(folder: Path) -> Groups:
    """The groups in the files of a folder, mapped."""
    return Groups(*(np.load(folder / name, mmap_mode="r") for name in group_names()))
