"""Every rank fetches all the keys and values that it needs, from their owners, at once.

The fewest steps and the best use of a full mesh of links, for the memory of all the keys and values that a rank sees.
Blocks are computed as their keys arrive. In the backward pass they are fetched again, and the gradients of each block
go straight home.
"""

from parallel.ring.problem import Problem
from parallel.ring.rounds import block, stay_home
from parallel.ring.schedule import Direction, Draft, Message, Schedule


def build(problem: Problem, direction: Direction) -> Schedule:
    draft, size = Draft(problem, direction), problem.world_size
    for rank in range(size):
        for distance in range(1, size):
            owner = (rank - distance) % size
            need = problem.need(rank, owner)
            if need is None:
                continue
            draft.transfer(0, owner, Message("keys", owner, need.key_segments, problem.heads, rank))
            draft.compute(distance, rank, block(problem, rank, owner, need))
            if direction == "backward":
                gradient = Message("dkeys", owner, need.key_segments, problem.heads, owner)
                draft.transfer(distance + 1, rank, gradient, min(distance + 2, size))
    stay_home(draft)
    return draft.finish()
