"""Ranks in rows and columns (Mesh-Attention, arXiv 2512.20968): a row shares its queries, a column its keys and values.

With rows of ``a`` ranks and columns of ``b``, a rank computes ``a * b`` blocks and sends ``a - 1`` shards of queries
and results and ``b - 1`` of keys instead of ``a * b - 1`` of either: TokenRing inside the row, a ring over the rows,
without sending the queries again on every round.

Both sides go round their lines hop by hop. The one of which a rank gets fewer comes first and is kept; each shard of
the other then meets all that is kept. What was summed for it goes straight home forward, rounded once; gradients travel
wide anyway and follow their shard one step behind, so that a rank sends to one neighbour and receives from another, and
no port waits while two messages share one elsewhere.
"""

from parallel.ring.problem import Problem, Segments, Side
from parallel.ring.rounds import block, by_holder, moved, stay_home, sum_of
from parallel.ring.schedule import Direction, Draft, Kind, Message, Schedule

Lines = dict[Side, list[int]]  # the owners of the shards that a rank gets, its own first, in the order of their coming
OTHER: dict[Side, Side] = {"query": "keys", "keys": "query"}


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
    lines: list[Lines] = [
        {
            "query": [rank - rank % a + (rank + i) % a for i in range(a)],
            "keys": [(rank - j * a) % size for j in range(b)],
        }
        for rank in range(size)
    ]
    kept: Side = "keys" if b <= a else "query"
    behind = sum_of(OTHER[kept], direction) if direction == "backward" else None
    for owner in range(size):
        _pass_on(draft, kept, owner, lines, 0)
        _pass_on(draft, OTHER[kept], owner, lines, min(a, b) - 1, behind)
    for rank in range(size):
        _work(draft, kept, rank, lines[rank], behind is None)
    stay_home(draft)
    return draft.finish()


def _last_step(kept: int, passing: int) -> int:
    """The last step, in which the last sums are merged; the last shard that comes by takes one a block."""
    return (kept - 1) + (passing - 1) + kept


def _wanted(problem: Problem, side: Side, owner: int, others: list[int]) -> Segments:
    """What some shards of the other side meet of the owner's shard."""
    needs = [problem.need(*((owner, other) if side == "query" else (other, owner))) for other in others]
    return tuple(sorted({segment for need in needs if need is not None for segment in moved(need, side)}))


def _pass_on(draft: Draft, side: Side, owner: int, lines: list[Lines], first: int, behind: Kind | None = None) -> None:
    """A shard goes down its line from step ``first`` on, each segment from the last rank that needed it; the sum
    ``behind`` it follows one step later, and in the end goes home."""
    problem, rank, hops = draft.problem, owner, len(lines[owner][side])
    last = _last_step(len(lines[owner][OTHER[side]]), hops)
    holders: dict[int, tuple[int, int]] = dict.fromkeys(problem.whole(side, owner), (0, owner))
    for hop in range(1, hops):
        rank = lines[rank][side][-1]  # the neighbour whose shard comes to us last gets ours first
        segments = _wanted(problem, side, owner, lines[rank][OTHER[side]])
        for (since, source), some in by_holder(holders, segments).items():
            draft.transfer(first + hop - 1, source, Message(side, owner, some, problem.heads, rank))
            if since > 0 and behind is not None:
                carried = Message(behind, owner, some, problem.heads, rank, wide=True)
                draft.transfer(first + hop, source, carried, first + hop)
        holders |= dict.fromkeys(segments, (hop, rank))
    if behind is not None:
        visited = tuple(segment for segment, (hop, _) in holders.items() if hop > 0)
        for (hop, rank), some in by_holder(holders, visited).items():
            step = last if hop == hops - 1 else first + hop + 1
            home = Message(behind, owner, some, problem.heads, owner, wide=True)
            draft.transfer(step, rank, home, min(step + 1, last))


def _work(draft: Draft, kept: Side, rank: int, line: Lines, straight: bool) -> None:
    """A rank's blocks, but for its own queries and keys, and what it sends home: the sums of what it has kept, and, if
    ``straight``, of what came by."""
    problem, passing = draft.problem, OTHER[kept]
    stock, visitors = line[kept], line[passing]
    last = _last_step(len(stock), len(visitors))

    def compute(step: int, one: int, two: int) -> None:
        queries, keys = (one, two) if kept == "query" else (two, one)
        need = problem.need(queries, keys)
        if need is not None:
            draft.compute(step, rank, block(problem, queries, keys, need))

    def send_home(step: int, side: Side, owner: int) -> None:
        result, segments = sum_of(side, draft.direction), _wanted(problem, side, owner, line[OTHER[side]])
        if result is not None and segments:
            home = Message(result, owner, segments, problem.heads, owner)
            draft.transfer(step, rank, home, min(step + 1, last))

    for step, one in enumerate(stock[1:], 1):
        compute(step, one, rank)
    for step, two in enumerate(visitors[1:], len(stock)):
        if step < len(stock) + len(visitors) - 2:
            for one in stock:
                compute(step, one, two)
            if straight:
                send_home(step + 1, passing, two)
            continue
        # With the last visitor the sums for what is kept are complete, one block a step.
        for i, one in enumerate(stock[1:]):
            compute(step + i, one, two)
            send_home(step + i + 1, kept, one)
        compute(last - 1, rank, two)
        if straight:
            send_home(last, passing, two)
