"""No sequence parallelism: one rank holds the whole sequence."""

from functools import lru_cache

from parallel.ring.schedule import Direction, Draft, Problem, Schedule, Strategy


def _build(problem: Problem, direction: Direction) -> Schedule:
    draft = Draft(problem, direction)
    block = problem.need(0, 0)
    assert block is not None, "a sequence sees itself"
    draft.compute(0, 0, block)
    return draft.finish()


@lru_cache
def forward(problem: Problem) -> Schedule:
    return _build(problem, "forward")


@lru_cache
def backward(problem: Problem) -> Schedule:
    return _build(problem, "backward")


STRATEGY = Strategy("local", forward, backward, single=True)
