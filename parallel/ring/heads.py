"""Splitting heads (DeepSpeed Ulysses, arXiv 2309.14509), alone or around another strategy (USP, arXiv 2405.07719).

Neighbouring ranks form groups. Inside a group every rank gets the shards of all its members, for its own slice of the
heads; the groups then are the ranks of an inner schedule, one for each slice; at the end the sums go home.
"""

from dataclasses import replace
from itertools import pairwise

import numpy as np

from parallel.ring.problem import Heads, Problem, Segments, Side
from parallel.ring.schedule import INPUTS, SUMS, Build, Compute, Direction, Draft, Kind, Message, Schedule


def slices(heads: Heads, group: int, count: int) -> list[Heads]:
    """``count`` slices as even as may be, some of them empty if there are fewer heads.

    A slice is made of whole groups of query heads that share a key head, or lies inside one group: then several ranks
    get the same key head.
    """
    key_heads = len(heads) // group
    if key_heads >= count:
        edges = [heads.start + group * (key_heads * i // count) for i in range(count + 1)]
    else:
        edges = [heads.start]
        for index in range(key_heads):
            sharing = count * (index + 1) // key_heads - count * index // key_heads
            first = heads.start + index * group
            edges += [first + group * (i + 1) // sharing for i in range(sharing)]
    return [Heads(a, b) for a, b in pairwise(edges)]


class _Groups:
    """Groups of ``size`` neighbouring ranks as the ranks of an inner problem, and the way back from it."""

    def __init__(self, problem: Problem, size: int, heads: Heads) -> None:
        self.problem, self.size, self.heads = problem, size, heads
        ranks = range(0, problem.world_size, size)
        queries, keys = (
            tuple(tuple(run for member in parts[rank : rank + size] for run in member) for rank in ranks)
            for parts in (problem.queries, problem.keys)
        )
        self.inner = replace(problem, queries=queries, keys=keys, heads=heads)

    def members(self, side: Side, group: int, segments: Segments) -> list[tuple[int, Segments]]:
        """Segments of a group's shard by the rank that owns them."""
        found: list[tuple[int, Segments]] = []
        first = 0
        for rank in range(group * self.size, (group + 1) * self.size):
            count = len(self.problem.parts(side)[rank])
            own = tuple(segment - first for segment in segments if first <= segment < first + count)
            if own:
                found.append((rank, own))
            first += count
        return found

    def messages(self, message: Message, peer: int) -> list[Message]:
        side: Side = "keys" if message.kind in ("keys", "dkeys") else "query"
        return [
            replace(message, owner=owner, segments=segments, peer=peer)
            for owner, segments in self.members(side, message.owner, message.segments)
        ]

    def blocks(self, block: Compute) -> list[Compute]:
        found: list[Compute] = []
        for queries, rows in self.members("query", block.queries, block.query_segments):
            for keys, columns in self.members("keys", block.keys, block.key_segments):
                need = self.problem.need(queries, keys, rows, columns)
                if need is not None:
                    found.append(Compute(queries, need.query_segments, keys, need.key_segments, self.heads))
        return found


def _in_use(problem: Problem, side: Side, rank: int) -> Segments:
    """The segments of a rank that see or are seen at all."""
    span = problem.span(side, rank)
    seen = problem.seen[span].any(1) if side == "query" else problem.seen[:, span].any(0)
    return tuple(np.flatnonzero(seen).tolist())


def split_heads(problem: Problem, direction: Direction, size: int, inner: Build) -> Schedule:
    """Groups of ``size`` ranks split the heads, ``inner`` is the strategy between the groups."""
    draft = Draft(problem, direction)
    for index, heads in enumerate(slices(problem.heads, problem.group, size)):
        if len(heads) > 0:
            groups = _Groups(problem, size, heads)
            schedule = inner(groups.inner, direction)
            draft.window = max(draft.window, schedule.window)
            _draft_slice(draft, groups, index, schedule)
    return draft.finish()


def _draft_slice(draft: Draft, groups: _Groups, index: int, inner: Schedule) -> None:
    """One slice of the heads, worked on by the ``index``-th rank of every group: fetch, the inner steps, bring home."""
    problem, size = draft.problem, groups.size
    sides: tuple[tuple[Kind, Side], ...] = (("query", "query"), ("keys", "keys"))
    for owner in range(problem.world_size):
        worker = owner - owner % size + index
        for kind, side in sides:
            segments = _in_use(problem, side, owner)
            if worker != owner and segments:
                draft.transfer(0, owner, Message(kind, owner, segments, groups.heads, worker))
    summed: dict[tuple[int, Kind, int], set[int]] = {}  # segments by worker, kind and owner
    for group, steps in enumerate(inner.ranks):
        worker = group * size + index
        merged = {message: number for number, step in enumerate(steps) for message in step.merges}
        for number, step in enumerate(steps):
            for message in step.receives:
                source = message.peer * size + index
                for each in groups.messages(message, worker):
                    merge = merged[message] + 1 if message.kind not in INPUTS else None
                    draft.transfer(number + 1, source, each, merge)
            for block in step.computes:
                for each in groups.blocks(block):
                    draft.compute(number + 1, worker, each)
                    for kind in SUMS[draft.direction]:
                        owner, segments = (
                            (each.keys, each.key_segments) if kind == "dkeys" else (each.queries, each.query_segments)
                        )
                        home = owner - owner % size + index  # where the inner schedule brings the sum
                        summed.setdefault((home, kind, owner), set()).update(segments)
    last = len(inner.ranks[0]) + 1
    for (worker, kind, owner), segments in summed.items():
        if worker != owner:
            draft.transfer(last, worker, Message(kind, owner, tuple(sorted(segments)), groups.heads, owner), last)
