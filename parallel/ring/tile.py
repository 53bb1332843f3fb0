"""Ranks in rows and columns (Mesh-Attention, arXiv 2512.20968): a row shares its queries, a column its keys and values.

With rows of ``a`` ranks and columns of ``b``, a rank gets the queries of its row straight from their owners and keeps
them, sees the keys of its column come by as in ring attention, and computes ``a * b`` blocks. What it has summed for a
query goes home once; so do, backward, the gradients for each shard of keys. A rank sends ``a - 1`` shards of queries
and results and ``b - 1`` of keys instead of ``a * b - 1`` of either: TokenRing inside the row, a ring over the rows,
without sending the queries again on every round.
"""

from parallel.ring.problem import Problem, Segments
from parallel.ring.rounds import block
from parallel.ring.schedule import Direction, Draft, Message, Schedule


def best_row(problem: Problem) -> int:
    """The length of a row for which a rank sends least: near ``sqrt(ranks * |KV| / (|Q| + |out|))``."""
    size = problem.world_size
    queries = sum(problem.tokens("query", rank, problem.whole("query", rank)) for rank in range(size))
    keys = sum(problem.tokens("keys", rank, problem.whole("keys", rank)) for rank in range(size))
    query_volume, key_volume = queries * len(problem.heads), keys * len(problem.key_heads(problem.heads))
    rows = [a for a in range(1, size + 1) if size % a == 0]
    return min(rows, key=lambda a: (a - 1) * query_volume + (size // a - 1) * key_volume)


def build(problem: Problem, direction: Direction, row: int | None = None) -> Schedule:
    """``row`` divides the number of ranks; None: :func:`best_row`."""
    draft, size = Draft(problem, direction), problem.world_size
    a = best_row(problem) if row is None else row
    b = size // a
    for rank in range(size):
        first = rank - rank % a
        members = [first + (rank + i) % a for i in range(a)]  # owners of the row's queries, our own first
        column = [(rank - j * a) % size for j in range(b)]  # owners of the column's keys, as they come by
        _gather_queries(draft, rank, members, column)
        _compute(draft, rank, members, column)
    for owner in range(size):
        _pass_keys(draft, owner, a, b)
    return draft.finish()


def _union(*segments: Segments) -> Segments:
    return tuple(sorted(set().union(*segments)))


def _gather_queries(draft: Draft, rank: int, members: list[int], column: list[int]) -> None:
    """Each of the row's other queries arrives in the step before its first block."""
    problem = draft.problem
    for i, owner in enumerate(members[1:]):
        needs = [problem.need(owner, keys) for keys in column]
        segments = _union(*(need.query_segments for need in needs if need is not None))
        if segments:
            draft.transfer(i, owner, Message("query", owner, segments, problem.heads, rank))


def _compute(draft: Draft, rank: int, members: list[int], column: list[int]) -> None:
    """All blocks of a rank, one a step, and its sums on their way home as soon as they are complete.

    Under the last keys our own queries come last, so that other ranks' results travel meanwhile.
    """
    problem, a, b = draft.problem, len(members), len(column)
    backward = draft.direction == "backward"
    end = a * b  # the step after the last block
    summed: dict[int, Segments] = {}
    for j, keys in enumerate(column):
        order = members if j < b - 1 else [*members[1:], members[0]]
        key_segments: Segments = ()
        for i, queries in enumerate(order):
            step = j * a + i
            need = problem.need(queries, keys)
            if need is not None:
                draft.compute(step, rank, block(problem, queries, keys, need))
                summed[queries] = _union(summed.get(queries, ()), need.query_segments)
                key_segments = _union(key_segments, need.key_segments)
            if j == b - 1 and queries != rank and queries in summed:
                result = Message("dquery" if backward else "out", queries, summed[queries], problem.heads, queries)
                draft.transfer(step + 1, rank, result, min(step + 2, end))
        if backward and keys != rank and key_segments:
            gradient = Message("dkeys", keys, key_segments, problem.heads, keys)
            draft.transfer((j + 1) * a, rank, gradient, min((j + 1) * a + 1, end))


def _pass_keys(draft: Draft, owner: int, a: int, b: int) -> None:
    """One shard of keys goes down its column; each segment from the last rank that needed it."""
    problem, size = draft.problem, draft.problem.world_size
    holders = dict.fromkeys(problem.whole("keys", owner), owner)
    for j in range(1, b):
        rank = (owner + j * a) % size
        row = range(rank - rank % a, rank - rank % a + a)
        needs = [problem.need(queries, owner) for queries in row]
        segments = _union(*(need.key_segments for need in needs if need is not None))
        for source in sorted({holders[segment] for segment in segments}):
            some = tuple(segment for segment in segments if holders[segment] == source)
            draft.transfer((j - 1) * a, source, Message("keys", owner, some, problem.heads, rank))
        holders |= dict.fromkeys(segments, rank)
