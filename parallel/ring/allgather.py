"""Every rank fetches all the keys and values that it needs, or all the queries, from their owners at once.

The fewest steps and the best use of a full mesh of links, for the memory of all that a rank sees. Blocks are computed
as their inputs arrive; the sums of each block for the owner of what was fetched go straight home as soon as they are
there, over links of their own. With queries, it is TokenRing without the ring.
"""

from parallel.ring.problem import Problem, Side
from parallel.ring.rounds import block, moved, stay_home, sum_of
from parallel.ring.schedule import Direction, Draft, Message, Schedule


def build(problem: Problem, direction: Direction, side: Side = "keys") -> Schedule:
    """``side``: what is fetched."""
    size, result = problem.world_size, sum_of(side, direction)
    draft = Draft(problem, direction, window=size + 1)
    for rank in range(size):
        for distance in range(1, size):
            owner = (rank - distance) % size
            queries, keys = (owner, rank) if side == "query" else (rank, owner)
            need = problem.need(queries, keys)
            if need is None:
                continue
            segments = moved(need, side)
            draft.transfer(0, owner, Message(side, owner, segments, problem.heads, rank))
            draft.compute(distance, rank, block(problem, queries, keys, need))
            if result is not None:
                draft.transfer(distance + 1, rank, Message(result, owner, segments, problem.heads, owner), size)
    stay_home(draft)
    return draft.finish()
