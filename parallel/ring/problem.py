"""What has to be computed, and by which pieces: the shards of all ranks cut into segments, and which segments meet.

A shard is cut so that all tokens of a segment are needed by the same ranks. What a mask empties between two ranks is
then neither computed nor sent, and the number of segments follows the number of ranks that share a document, not the
number of documents. A segment that other ranks need is cut once more in the middle, so that a strategy can send half
of a shard one way and half the other.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fused.mask import Ranges
from fused.tiles import IntArray
from parallel.layout import Layout, Run

Segments = tuple[int, ...]  # segments of one shard, counted from 0 inside the shard, ascending
Side = Literal["query", "keys"]
Flags = NDArray[np.bool_]
Parts = tuple[tuple[Run, ...], ...]  # the segments of every rank


class Heads(NamedTuple):
    """The query heads ``[start, stop)``: whole groups that share a key head, or some heads of one group."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def covers(self, other: "Heads") -> bool:
        return self.start <= other.start and other.stop <= self.stop


class Need(NamedTuple):
    """The segments of one shard's queries and of one shard's keys that see each other."""

    query_segments: Segments
    key_segments: Segments


@cache
def _first(count: int) -> Segments:
    return tuple(range(count))


@dataclass(frozen=True, eq=False)
class Problem:
    """``pairs[i, j]`` counts the token pairs in which query segment ``i`` sees key segment ``j``, the segments of all
    ranks in rank order. Problems are equal if everything in them is, so schedules can be kept by problem."""

    queries: Parts
    keys: Parts
    pairs: NDArray[np.int64]
    heads: Heads
    group: int  # query heads that share a key head

    @cached_property
    def _identity(self) -> tuple[object, ...]:
        return self.queries, self.keys, self.heads, self.group, self.pairs.tobytes()

    @cached_property
    def _hash(self) -> int:
        return hash(self._identity)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Problem) and self._hash == other._hash and self._identity == other._identity

    @cached_property
    def seen(self) -> Flags:
        """Which query segments see which key segments."""
        return np.greater(self.pairs, 0)

    @property
    def world_size(self) -> int:
        return len(self.queries)

    def parts(self, side: Side) -> Parts:
        return self.queries if side == "query" else self.keys

    @cached_property
    def _offsets(self) -> dict[Side, list[int]]:
        """Where the segments of each rank begin among those of all."""
        sides: tuple[Side, Side] = ("query", "keys")
        return {side: [0, *np.cumsum([len(part) for part in self.parts(side)]).tolist()] for side in sides}

    def span(self, side: Side, rank: int) -> slice:
        """The segments of a rank among those of all ranks."""
        offsets = self._offsets[side]
        return slice(offsets[rank], offsets[rank + 1])

    def whole(self, side: Side, rank: int) -> Segments:
        return _first(len(self.parts(side)[rank]))

    def tokens(self, side: Side, rank: int, segments: Iterable[int]) -> int:
        """How many tokens some segments of a shard have together."""
        part = self.parts(side)[rank]
        return sum(len(part[segment]) for segment in segments)

    def key_heads(self, heads: Heads) -> Heads:
        """The key heads that some query heads read."""
        return Heads(heads.start // self.group, -(-heads.stop // self.group))

    def need(
        self, queries: int, keys: int, query_segments: Segments | None = None, key_segments: Segments | None = None
    ) -> Need | None:
        """Which of (some segments of) two shards see each other; None if none do."""
        seen = self.seen[self.span("query", queries), self.span("keys", keys)]
        rows = self.whole("query", queries) if query_segments is None else query_segments
        columns = self.whole("keys", keys) if key_segments is None else key_segments
        seen = seen[np.ix_(rows, columns)]
        if not seen.any():
            return None
        some_rows, some_columns = np.flatnonzero(seen.any(1)).tolist(), np.flatnonzero(seen.any(0)).tolist()
        return Need(tuple(rows[i] for i in some_rows), tuple(columns[i] for i in some_columns))


def _cut(layout: Layout, needs: Sequence[Flags], shared: Flags, base: int) -> Parts:
    """Each rank's runs cut where the ranks that need a token change, and in the middle of what ranks share.

    ``needs`` has for each rank the tokens that it needs; all flags are by position less ``base``.
    """
    changes = np.zeros(len(shared), dtype=bool)  # a token is needed by others than the one before it
    for needed in needs:
        changes[1:] |= needed[1:] != needed[:-1]
    parts: list[tuple[Run, ...]] = []
    for runs in layout.ranks:
        segments: list[Run] = []
        for start, stop in runs:
            inner = np.flatnonzero(changes[start + 1 - base : stop - base]) + start + 1
            for a, b in pairwise([start, *inner.tolist(), stop]):
                middle = (a + b) // 2
                halves = ((a, middle), (middle, b)) if shared[a - base] and middle > a else ((a, b),)
                segments += [Run(*half) for half in halves]
        parts.append(tuple(segments))
    return tuple(parts)


def _seen(ranges: Ranges, length: int) -> Flags:
    """The keys that at least one of some queries sees."""
    start, stop = ranges
    some = start < stop
    edges = np.bincount(start[some], minlength=length + 1) - np.bincount(stop[some], minlength=length + 1)
    return np.cumsum(edges)[:length].astype(bool)


def _segments(queries: Layout, keys: Layout, ranges: Sequence[Ranges]) -> tuple[Parts, Parts]:
    """The segments of all ranks' queries and keys."""
    size, length, base = len(keys.ranks), keys.bounds.stop, queries.bounds.start
    key_needs: list[Flags] = []
    query_needs = np.zeros((size, queries.bounds.stop - base), dtype=bool)  # the rank holds keys that the query sees
    shared_keys, shared_queries = np.zeros(length, dtype=bool), np.zeros(query_needs.shape[1], dtype=bool)
    owned = np.zeros((size, length + 1), dtype=np.int64)  # after the cumulative sum: keys held before a position
    for rank in range(size):
        owned[rank, keys.positions(rank) + 1] = 1
    before = owned.cumsum(1)
    for rank, found in enumerate(ranges):
        key_needs.append(_seen(found, length))
        shared_keys |= key_needs[rank] & (owned[rank, 1:] == 0)
        places = queries.positions(rank) - base
        needed = np.any(before[:, found[1]] > before[:, found[0]], axis=1)
        query_needs[:, places] = needed
        shared_queries[places] = np.delete(query_needs[:, places], rank, axis=0).any(0)
    return _cut(queries, list(query_needs), shared_queries, base), _cut(keys, key_needs, shared_keys, 0)


def _count_pairs(queries: Layout, query_parts: Parts, key_parts: Parts, ranges: Sequence[Ranges]) -> NDArray[np.int64]:
    """Visible token pairs of all query segments (rows) and all key segments (columns)."""
    segments = [run for part in key_parts for run in part]
    order = sorted(range(len(segments)), key=lambda index: segments[index].start)
    edges = np.array([segments[index].start for index in order] + [max((run.stop for run in segments), default=0)])
    rows: list[IntArray] = []
    for rank, part in enumerate(query_parts):
        first = 0
        for run in part:
            start, stop = (bound[:, first : first + len(run)] for bound in ranges[rank])
            first += len(run)
            row = np.zeros(len(segments), dtype=np.int64)
            low = max(int(np.searchsorted(edges, start.min(), side="right")) - 1, 0)
            high = int(np.searchsorted(edges, stop.max()))
            for place in range(low, min(high, len(segments))):
                overlap = np.minimum(stop, edges[place + 1]) - np.maximum(start, edges[place])
                row[order[place]] = overlap.clip(0).sum()
            rows.append(row)
    return np.array(rows, dtype=np.int64).reshape(len(rows), len(segments))


def make_problem(queries: Layout, keys: Layout, ranges: Sequence[Ranges], heads: int, kv_heads: int) -> Problem:
    """The problem of queries and keys in their layouts; ``ranges`` are those of each rank's queries over positions.

    Every position below ``keys.bounds.stop`` is held by one rank.
    """
    query_parts, key_parts = _segments(queries, keys, ranges)
    pairs = _count_pairs(queries, query_parts, key_parts, ranges)
    return Problem(query_parts, key_parts, pairs, Heads(0, heads), heads // kv_heads)
