"""No sequence parallelism: one rank holds the whole sequence."""

from parallel.ring.problem import Problem
from parallel.ring.rounds import stay_home
from parallel.ring.schedule import Direction, Draft, Schedule


def build(problem: Problem, direction: Direction) -> Schedule:
    draft = Draft(problem, direction)
    stay_home(draft)
    return draft.finish()
