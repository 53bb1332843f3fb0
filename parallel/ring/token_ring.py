"""TokenRing (arXiv 2412.20501): keys and values stay, queries visit every rank, one hop a step, and each partial
result goes straight back to the query's owner, against the traffic of the queries.

Forward: step ``i`` computes the block of the queries that started ``i`` ranks away while the next ones arrive; its
``(out, lse)`` goes home in step ``i + 1`` and is merged there at the end of step ``i + 2``, so neither end waits for
it. The paper's last return has nothing beside it; here half of each rank's own block is left for then. Backward: the
queries travel with the gradient of their output, their lse and their delta; ``dquery`` goes home the same way, and the
gradients of keys and values never leave their owner.
"""

from parallel.ring.problem import Problem
from parallel.ring.rounds import go_round, stay_home
from parallel.ring.schedule import Direction, Draft, Schedule

SHIFT = -1  # queries move to lower ranks, whose keys lie in their past: with a causal mask they can stop early


def build(problem: Problem, direction: Direction) -> Schedule:
    draft = Draft(problem, direction)
    go_round(draft, "query", SHIFT, "straight")
    stay_home(draft)
    return draft.finish()
