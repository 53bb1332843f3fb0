"""TokenRing (arXiv 2412.20501): keys and values stay, queries visit every rank, one hop a step, and each partial
result goes straight back to the query's owner, against the traffic of the queries.

Forward: step ``i`` computes the block of the queries that started ``i`` ranks away while the next ones arrive; its
``(out, lse)`` goes home in step ``i + 1`` and is merged there at the end of step ``i + 2``, so neither end waits for
it. Backward: the queries travel with the gradient of their output, their lse and their delta; ``dquery`` goes home the
same way, and the gradients of keys and values never leave their owner.
"""

from functools import lru_cache

from parallel.ring.schedule import Direction, Draft, Kind, Problem, Schedule, Strategy, journey

SHIFT = -1  # queries move to lower ranks, whose keys lie in their past: with a causal mask they can stop early


def _build(problem: Problem, direction: Direction) -> Schedule:
    draft = Draft(problem, direction)
    result: Kind = "out" if direction == "forward" else "dquery"
    last = problem.world_size  # the step after the last compute
    for owner in range(problem.world_size):
        stops = journey(problem, owner, "query", SHIFT)
        for hop, stop in enumerate(stops):
            if hop + 1 < len(stops):
                following = stops[hop + 1]
                draft.transfer(hop, stop.rank, following.rank, "query", owner, following.carried)
            if stop.block is not None:
                draft.compute(hop, stop.rank, stop.block)
                if hop > 0:
                    home = min(hop + 2, last)
                    draft.transfer(hop + 1, stop.rank, owner, result, owner, stop.block.query_parts, merge=home)
    return draft.finish()


@lru_cache
def forward(problem: Problem) -> Schedule:
    return _build(problem, "forward")


@lru_cache
def backward(problem: Problem) -> Schedule:
    return _build(problem, "backward")


STRATEGY = Strategy("token_ring", forward, backward)
