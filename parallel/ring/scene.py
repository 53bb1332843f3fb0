"""One kind of attention call: layouts, mask and documents, and what follows from them for schedules and kernels."""

from functools import cached_property, lru_cache

import numpy as np

from fused.mask import BlockMask, Mask, Ranges
from fused.tiles import IntArray
from parallel.layout import Layout
from parallel.ring.problem import Problem, Segments, Side, make_problem
from parallel.ring.schedule import Compute


class Scene:
    """Queries and keys in their layouts, the mask, and the documents of the whole sequence ``[batch, keys]`` if any.

    Every block's mask is made once, however many layers ask for it.
    """

    def __init__(
        self, queries: Layout, keys: Layout, mask: Mask, heads: int, kv_heads: int, documents: IntArray | None = None
    ) -> None:
        self.queries, self.keys, self.mask = queries, keys, mask
        self._heads, self._kv_heads, self._documents = heads, kv_heads, documents
        self._masks: dict[tuple[int, Segments, int, Segments], BlockMask] = {}

    @cached_property
    def ranges(self) -> list[Ranges]:
        """The visible ranges of every rank's queries."""
        length = self.keys.bounds.stop
        ranks = range(len(self.queries.ranks))
        return [self.mask.ranges(self.queries.positions(rank), length, self._documents) for rank in ranks]

    @cached_property
    def problem(self) -> Problem:
        return make_problem(self.queries, self.keys, self.ranges, self._heads, self._kv_heads)

    def _places(self, side: Side, rank: int, segments: Segments) -> tuple[IntArray, IntArray]:
        """Where the tokens of some segments are in their shard, and their absolute positions."""
        runs = self.problem.parts(side)[rank]
        first = np.cumsum([0, *(len(run) for run in runs)])
        places = [np.arange(first[segment], first[segment + 1]) for segment in segments]
        return np.concatenate(places), np.concatenate([np.arange(*runs[segment]) for segment in segments])

    def block_mask(self, block: Compute) -> BlockMask:
        key = (block.queries, block.query_segments, block.keys, block.key_segments)
        if key not in self._masks:
            places, queries = self._places("query", block.queries, block.query_segments)
            _, keys = self._places("keys", block.keys, block.key_segments)
            start, stop = self.ranges[block.queries]
            self._masks[key] = BlockMask.of((start[:, places], stop[:, places]), queries, keys)
        return self._masks[key]


@lru_cache(maxsize=64)
def plain_scene(queries: Layout, keys: Layout, mask: Mask, heads: int, kv_heads: int) -> Scene:
    """The scene of a call without documents, kept for the next one."""
    return Scene(queries, keys, mask, heads, kv_heads)
