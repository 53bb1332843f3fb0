"""Ring attention (arXiv 2310.01889): queries stay, keys and values visit every rank, one hop a step.

In the backward pass the gradient of the keys and values follows them one step behind. Its owner's own share never
leaves home, and the last visitor sends the rest there, so it is sent once less than around the whole ring.
"""

from parallel.ring.problem import Problem
from parallel.ring.rounds import go_round, stay_home
from parallel.ring.schedule import Direction, Draft, Schedule


def _one_way(problem: Problem, direction: Direction, shift: int) -> Schedule:
    draft = Draft(problem, direction)
    go_round(draft, "keys", shift, "carried")
    stay_home(draft)
    return draft.finish()


def build(problem: Problem, direction: Direction) -> Schedule:
    """Of the two ways around the ring the one with less traffic: under a causal mask the first ranks' keys are needed
    most widely, so it matters where a shard's way begins."""
    return min((_one_way(problem, direction, shift) for shift in (1, -1)), key=lambda schedule: schedule.haul)
