"""Ring attention over links that carry both ways at once: half of the keys and values go round one way, half the other.

Every link direction carries half as much as in a one-way ring, in as many steps.
"""

from parallel.ring.problem import Problem
from parallel.ring.rounds import go_round, halves, stay_home
from parallel.ring.schedule import Direction, Draft, Schedule


def build(problem: Problem, direction: Direction) -> Schedule:
    draft = Draft(problem, direction)
    for shift, lots in zip((1, -1), halves(problem, "keys"), strict=True):
        go_round(draft, "keys", shift, "carried", lots)
    stay_home(draft)
    return draft.finish()
