"""Ulysses (arXiv 2309.14509): an all-to-all gives every rank the whole sequence for its share of the heads.

A rank sends ``(N - 1) / N`` of its shard once each way, less than any strategy that moves whole heads, as long as there
are heads enough; ranks beyond the key heads get copies of them. Nothing is computed while it travels.
"""

from parallel.ring.heads import split_heads
from parallel.ring.problem import Problem
from parallel.ring.rounds import stay_home
from parallel.ring.schedule import Direction, Draft, Schedule


def _alone(problem: Problem, direction: Direction) -> Schedule:
    draft = Draft(problem, direction)
    stay_home(draft)
    return draft.finish()


def build(problem: Problem, direction: Direction) -> Schedule:
    return split_heads(problem, direction, problem.world_size, _alone)
