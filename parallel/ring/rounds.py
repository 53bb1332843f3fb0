"""What the strategies that move one side of the problem around the ranks have in common.

Each segment visits the ranks that need it, in the order of the ring, and no others; the last rank that had it sends it
on. With a dense mask that is a hop to the neighbour in every step, with a sparse one it skips ranks.
"""

from typing import Literal, NamedTuple

from parallel.ring.problem import Need, Problem, Segments, Side
from parallel.ring.schedule import Compute, Draft, Kind, Message


class Stop(NamedTuple):
    """A rank that needs something of a travelling shard, ``hop`` ranks from its home."""

    hop: int
    rank: int
    need: Need


def _stops(problem: Problem, owner: int, side: Side, shift: int, lot: Segments) -> list[Stop]:
    """The ranks other than the owner that need some of ``lot``, in the order in which it comes by."""
    stops: list[Stop] = []
    for hop in range(1, problem.world_size):
        rank = (owner + hop * shift) % problem.world_size
        need = problem.need(owner, rank, lot) if side == "query" else problem.need(rank, owner, key_segments=lot)
        if need is not None:
            stops.append(Stop(hop, rank, need))
    return stops


def moved(need: Need, side: Side) -> Segments:
    """The segments of the travelling side."""
    return need.query_segments if side == "query" else need.key_segments


def sum_of(side: Side, direction: str) -> Kind | None:
    """The sum that belongs to the owner of what travels; None if nothing is summed for it."""
    if side == "query":
        return "out" if direction == "forward" else "dquery"
    return "dkeys" if direction == "backward" else None


def block(problem: Problem, queries: int, keys: int, need: Need) -> Compute:
    return Compute(queries, need.query_segments, keys, need.key_segments, problem.heads)


def by_holder(holders: dict[int, tuple[int, int]], segments: Segments) -> dict[tuple[int, int], Segments]:
    """Segments by the ``(hop, rank)`` that had them last."""
    groups: dict[tuple[int, int], Segments] = {}
    for segment in segments:
        groups[holders[segment]] = (*groups.get(holders[segment], ()), segment)
    return groups


def go_round(
    draft: Draft, side: Side, shift: int, returns: Literal["carried", "straight"], lots: list[Segments] | None = None
) -> None:
    """Let one side of the problem (for each rank the segments in ``lots``, else all) travel ``shift`` ranks a hop.

    The shard that is ``hop`` ranks from home is computed with in step ``hop``. Sums for its owner are ``carried``
    behind it from rank to rank, one step behind, or go ``straight`` home from each.
    """
    problem, result = draft.problem, sum_of(side, draft.direction)
    for owner in range(problem.world_size):
        lot = problem.whole(side, owner) if lots is None else lots[owner]
        holders: dict[int, tuple[int, int]] = dict.fromkeys(lot, (0, owner))
        stops = _stops(problem, owner, side, shift, lot)
        for hop, rank, need in stops:
            segments = moved(need, side)
            for (since, source), some in by_holder(holders, segments).items():
                draft.transfer(hop - 1, source, Message(side, owner, some, problem.heads, rank))
                if since > 0 and returns == "carried" and result is not None:
                    draft.transfer(hop, source, Message(result, owner, some, problem.heads, rank, wide=True), hop)
            queries, keys = (owner, rank) if side == "query" else (rank, owner)
            draft.compute(hop, rank, block(problem, queries, keys, need))
            holders |= dict.fromkeys(segments, (hop, rank))
            if returns == "straight" and result is not None:
                home = min(hop + 2, problem.world_size)
                draft.transfer(hop + 1, rank, Message(result, owner, segments, problem.heads, owner), home)
        if returns == "carried" and result is not None:
            visited = tuple(segment for segment in lot if holders[segment][0] > 0)
            for (hop, rank), some in by_holder(holders, visited).items():
                draft.transfer(hop + 1, rank, Message(result, owner, some, problem.heads, owner, wide=True), hop + 1)


def stay_home(draft: Draft) -> None:
    """Each rank's queries against its own keys: one half of the work in step 0, where it hides the first transfer, the
    other in the last step, where it hides the last sums on their way home. Called when all else is drafted."""
    problem = draft.problem
    for rank in range(problem.world_size):
        need = problem.need(rank, rank)
        if need is None:
            continue
        first = need.query_segments
        if draft.merges(rank):
            work = problem.pairs[problem.span("query", rank), problem.span("keys", rank)].sum(1)
            first = tuple(s for s in first if 2 * work[: s + 1].sum() <= work.sum()) or first
        rest = tuple(s for s in need.query_segments if s not in first)
        for step, rows in ((0, first), (draft.steps - 1, rest)):
            part = problem.need(rank, rank, rows) if rows else None
            if part is not None:
                draft.compute(step, rank, block(problem, rank, rank, part))


def halves(problem: Problem, side: Side) -> tuple[list[Segments], list[Segments]]:
    """Each rank's segments in two lots that weigh about the same in tokens and the ranks that need them."""
    lots: tuple[list[Segments], list[Segments]] = ([], [])
    for rank in range(problem.world_size):
        span = problem.span(side, rank)
        weight = [0, 0]
        chosen: tuple[list[int], list[int]] = ([], [])
        for segment in problem.whole(side, rank):
            line = problem.seen[span.start + segment] if side == "query" else problem.seen[:, span.start + segment]
            other: Side = "keys" if side == "query" else "query"
            needers = sum(bool(line[problem.span(other, peer)].any()) for peer in range(problem.world_size))
            lighter = 0 if weight[0] <= weight[1] else 1
            weight[lighter] += needers * problem.tokens(side, rank, (segment,))
            chosen[lighter].append(segment)
        for lot, segments in zip(lots, chosen, strict=True):
            lot.append(tuple(segments))
    return lots
