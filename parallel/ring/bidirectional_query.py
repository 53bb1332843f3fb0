"""TokenRing over neighbour links alone: half of the queries go round one way, half the other, and the running result of
each follows its queries one hop behind, until it closes the circle at home.

A direct return crosses many links of a physical ring, about ``ranks^2 / 8`` shards in all; here every message takes
one. The running sums stay in the dtype of accumulation, or every hop would round them.
"""

from parallel.ring.problem import Problem
from parallel.ring.rounds import go_round, halves, stay_home
from parallel.ring.schedule import Direction, Draft, Schedule


def build(problem: Problem, direction: Direction) -> Schedule:
    draft = Draft(problem, direction)
    for shift, lots in zip((1, -1), halves(problem, "query"), strict=True):
        go_round(draft, "query", shift, "carried", lots)
    stay_home(draft)
    return draft.finish()
