"""USP (arXiv 2405.07719): groups of neighbouring ranks split the heads as Ulysses does, and any other strategy runs
between the groups, for more ranks than there are heads or where links inside a group are faster."""

from parallel.ring.heads import split_heads
from parallel.ring.problem import Problem
from parallel.ring.schedule import Build, Direction, Schedule


def best_group(problem: Problem) -> int:
    """The largest proper divisor of the number of ranks for which no key head is copied; 1 if there is none."""
    size, key_heads = problem.world_size, len(problem.key_heads(problem.heads))
    return max((u for u in range(1, size) if size % u == 0 and key_heads % u == 0), default=1)


def build(problem: Problem, direction: Direction, inner: Build, group: int | None = None) -> Schedule:
    """``group`` divides the number of ranks; None: :func:`best_group`."""
    return split_heads(problem, direction, best_group(problem) if group is None else group, inner)
